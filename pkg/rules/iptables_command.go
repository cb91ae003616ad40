package rules

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"
)

// lockSeconds bounds the wait for the xtables lock.
const lockSeconds = 5

// lockExitStatus is iptables' exit status when it could not get the lock (xtables.h,
// RESOURCE_PROBLEM).
const lockExitStatus = 4

// listRules returns the rules of a chain, each as its words.
func listRules(ipt *goiptables.IPTables, table, chain string) ([][]string, error) {
	lines, err := ipt.List(table, chain)
	if err != nil {
		return nil, wrapIPTables("chain "+chain, err)
	}
	var rules [][]string
	for _, line := range lines {
		if spec, isRule := strings.CutPrefix(line, "-A "+chain+" "); isRule {
			rules = append(rules, strings.Fields(strings.ReplaceAll(spec, `"`, "")))
		}
	}
	return rules, nil
}

// open returns the command of a family. It runs the command once to learn its version.
func (t *iptables) open(ctx context.Context, n *Node, f *family) (*goiptables.IPTables, error) {
	if ipt := t.opened[f]; ipt != nil {
		return ipt, nil
	}
	path, err := t.find(ctx, n, f)
	if err != nil {
		return nil, err
	}
	protocol := goiptables.ProtocolIPv4
	if f == ipv6 {
		protocol = goiptables.ProtocolIPv6
	}
	ipt, err := goiptables.New(goiptables.Path(path), goiptables.IPFamily(protocol), goiptables.Timeout(lockSeconds))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrNoIPTables, path, err)
	}
	if t.opened == nil {
		t.opened = make(map[*family]*goiptables.IPTables)
	}
	t.opened[f] = ipt
	return ipt, nil
}

// find returns the path of the node's command. On a kernel without nftables it prefers
// iptables-legacy: the plain iptables may be iptables-nft, which needs nftables.
func (t *iptables) find(ctx context.Context, n *Node, f *family) (string, error) {
	names := []string{"iptables"}
	if f == ipv6 {
		names = []string{"ip6tables"}
	}
	if errors.Is(n.checkSupported(ctx), ErrUnsupported) {
		names = []string{names[0] + "-legacy", names[0]}
	}
	for _, name := range names {
		for _, dir := range t.dirs {
			path := filepath.Join(dir, name)
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("%w: %s in none of %s", ErrNoIPTables, names[0], strings.Join(t.dirs, ":"))
}

// isUsed reports whether rules of this backend can be on the node, without running a command: the
// legacy command would make the tables that it is asked for, and each packet would pass them.
func (t *iptables) isUsed(n *Node) bool {
	if conn, err := n.nft(); err == nil {
		for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
			if conn.HasChain(family, "nat", IPTablesChain) {
				return true
			}
		}
	}
	for _, list := range []string{"/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"} {
		f, err := os.Open(list)
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				return true
			}
			continue
		}
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if lines.Text() == "nat" || lines.Text() == "mangle" {
				return true
			}
		}
	}
	return false
}

// IPTablesDirs returns the directories of PATH and those where distributions put iptables: a
// runtime's PATH does not always have them.
func IPTablesDirs() []string {
	var dirs []string
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin") {
		if filepath.IsAbs(dir) && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// wrapIPTables prefixes an error with the object of the command. It wraps ErrBusy if the command
// did not get the xtables lock in time.
func wrapIPTables(object string, err error) error {
	if err == nil {
		return nil
	}
	if exit, isExit := errors.AsType[*goiptables.Error](err); isExit && exit.ExitStatus() == lockExitStatus {
		return fmt.Errorf("%s: %w: %w", object, ErrBusy, err)
	}
	return fmt.Errorf("%s: %w", object, err)
}
