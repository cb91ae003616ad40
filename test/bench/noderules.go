package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// manyRules is how many rules kube-proxy has in the nat table of a cluster with some thousand
// endpoints.
const manyRules = 20000

// addRules makes rules in the node's nat table by iptables-nft. No packet passes them: they make
// commands slow that read the table.
func addRules(ctx context.Context, bed *testbed.Bed, rules int) error {
	if rules == 0 {
		return nil
	}
	script := bytes.NewBufferString("*nat\n:BENCH - [0:0]\n")
	for i := range rules {
		fmt.Fprintf(script, "-A BENCH -s 10.%d.%d.%d/32 -j RETURN\n", 210+i>>16, i>>8&255, i&255)
	}
	script.WriteString("COMMIT\n")
	file := filepath.Join(bed.Dir, "rules")
	if err := os.WriteFile(file, script.Bytes(), 0o600); err != nil {
		return err
	}
	_, err := bed.Node.Run(ctx, bed.ClientEnv(), "iptables-nft-restore", "--noflush", file)
	return err
}

// iptablesPath returns a PATH whose iptables is iptables-nft, whichever the machine's alternative
// is.
func iptablesPath(bed *testbed.Bed) (string, error) {
	dir := filepath.Join(bed.Dir, "iptables")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	multi, err := exec.LookPath("xtables-nft-multi")
	if err != nil {
		return "", fmt.Errorf("%w (Debian package iptables)", err)
	}
	for _, name := range []string{"iptables", "ip6tables", "iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink(multi, filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	return dir + ":/usr/sbin:/usr/bin:/sbin:/bin", nil
}
