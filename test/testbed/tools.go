package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Tools are the directories of the programs that a testbed runs.
type Tools []string

// BuildTools builds the programs by scripts/build-test-tools.sh, which prints its progress on
// standard error. With external it leaves out this repository's own programs.
func BuildTools(ctx context.Context, external bool) (Tools, error) {
	if external {
		return build(ctx, "external")
	}
	return build(ctx)
}

// BuildClients builds programs with the AWS SDKs (test/clients).
func BuildClients(ctx context.Context) (Tools, error) { return build(ctx, "clients") }

func build(ctx context.Context, args ...string) (Tools, error) {
	_, here, _, _ := runtime.Caller(0)
	script := filepath.Join(filepath.Dir(here), "..", "..", "scripts", "build-test-tools.sh")
	cmd := exec.CommandContext(ctx, script, args...)
	cmd.Stderr = os.Stderr
	// SIGTERM lets the script end its children. SIGKILL would leave them running.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", script, err)
	}
	return filepath.SplitList(strings.TrimSpace(string(out))), nil
}

// Path returns the file of a program. The error for a missing one contains its name.
func (t Tools) Path(program string) (string, error) {
	for _, dir := range t {
		file := filepath.Join(dir, program)
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s is in none of %s", program, strings.Join(t, ", "))
}

// packages are the Debian packages of the programs that testbeds and their users run.
var packages = map[string]string{
	"iptables-nft":        "iptables",
	"iptables-legacy":     "iptables",
	"ip":                  "iproute2",
	"modprobe":            "kmod",
	"nft":                 "nftables",
	"conntrack":           "conntrack",
	"ipvsadm":             "ipvsadm",
	"strace":              "strace",
	"/usr/bin/aws":        "awscli",
	"/usr/bin/python3":    "python3-boto3",
	"/usr/bin/cloud-init": "cloud-init",
}

// Require returns an error that lists all missing programs and their Debian packages.
func Require(programs ...string) error {
	var errs []error
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			errs = append(errs, fmt.Errorf("%s is missing (Debian package %s)", program, packages[program]))
		}
	}
	return errors.Join(errs...)
}
