package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// stand is what the tests have in place of each iptables command: it notes the call, fails it if it is told to by a part of
// its arguments or of the rules that it is given, and else calls the real one, which PATH leads to.
const stand = `#!/bin/sh
dir=${0%/*} name=${0##*/} input=
case $name in *-restore) input=$(/bin/cat) ;; esac
echo "$name $*" >>"$dir/log"
if [ -e "$dir/fail" ]; then
	read -r status part <"$dir/fail"
	case "$name $* $input" in *"$part"*) echo "told to fail" >&2; exit "$status" ;; esac
fi
printf '%s\n' "$input" | "$name" "$@"
`

// namespace is a network namespace of the test's own, which its thread is in and which dies with it.
type namespace struct {
	*testing.T
	dir string // of the iptables commands
	Node
}

// newNamespace makes a namespace and gives its node the iptables commands of the given names. It needs root.
func newNamespace(t *testing.T, commands ...string) *namespace {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("new network namespace (these tests need root): %v", err)
	}
	// The lock of the machine is not the test's.
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
	n := &namespace{T: t, dir: t.TempDir()}
	for _, name := range commands {
		n.command(name)
	}
	var mu sync.Mutex
	n.Node = Node{
		Dirs: []string{n.dir},
		Lock: func(context.Context) (func(), error) { mu.Lock(); return mu.Unlock, nil },
	}
	return n
}

// command gives the node a command, with those that come with it.
func (n *namespace) command(name string) {
	n.Helper()
	for _, with := range []string{"", "-restore", "-save"} {
		n.must(os.WriteFile(filepath.Join(n.dir, name+with), []byte(stand), 0o755))
	}
}

var both = []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"}

// calls are the iptables commands that were run since the last question.
func (n *namespace) calls() []string {
	n.Helper()
	file := filepath.Join(n.dir, "log")
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	n.must(err)
	n.must(os.Remove(file))
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

// fail makes the calls that contain part fail; with status 0 none fails any more.
func (n *namespace) fail(status int, part string) {
	n.Helper()
	file := filepath.Join(n.dir, "fail")
	if status == 0 {
		n.must(os.Remove(file))
		return
	}
	n.must(os.WriteFile(file, fmt.Appendf(nil, "%d %s\n", status, part), 0o644))
}

func (n *namespace) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

// run runs a real command in the namespace.
func (n *namespace) run(command string) string {
	n.Helper()
	words := strings.Fields(command)
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		n.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// rules is the ruleset of one form and family as its save command writes it, without comments and counters.
func (n *namespace) rules(form Form, v6 bool) string {
	n.Helper()
	save := string(form) + "-save"
	if v6 {
		save = strings.Replace(save, "iptables", "ip6tables", 1)
	}
	var kept []string
	for line := range strings.Lines(n.run(save)) {
		if !strings.HasPrefix(line, "#") {
			if strings.HasPrefix(line, ":") {
				line, _, _ = strings.Cut(line, " [")
			}
			kept = append(kept, strings.TrimRight(line, "\n"))
		}
	}
	return strings.Join(kept, "\n")
}

// everything is all rules of the namespace.
func (n *namespace) everything() string {
	n.Helper()
	var all []string
	for _, form := range []Form{NFT, Legacy} {
		for _, v6 := range []bool{false, true} {
			all = append(all, fmt.Sprintf("%s v6=%v", form, v6), n.rules(form, v6))
		}
	}
	return strings.Join(all, "\n")
}

func (n *namespace) iptables(form Form) *IPTables {
	n.Helper()
	t, err := n.IPTables(form)
	n.must(err)
	return t
}

// forget makes the node what it is to the next process: nothing is opened.
func (n *namespace) forget() { n.Close(); n.forms, n.ports = nil, nil }

var (
	metadata4 = netip.MustParseAddrPort("169.254.169.254:80")
	metadata6 = netip.MustParseAddrPort("[fd00:ec2::254]:80")
	proxy4    = netip.MustParseAddrPort("192.168.7.2:8181")
	proxy6    = netip.MustParseAddrPort("[fd00:7::2]:8181")
	base4     = Base{Metadata: []netip.AddrPort{metadata4}, Guard: true}
	baseDual  = Base{Metadata: []netip.AddrPort{metadata4, metadata6}, Guard: true}
)

func redirection(source string) Redirection {
	ip := netip.MustParseAddr(source)
	if ip.Is6() {
		return Redirection{ip, metadata6, proxy6}
	}
	return Redirection{ip, metadata4, proxy4}
}

func routed(id, link string, sources ...string) Attachment {
	a := Attachment{ID: id, HostLink: link}
	for _, s := range sources {
		a.Redirections = append(a.Redirections, redirection(s))
	}
	return a
}

func bridged(id, link string, sources ...string) Attachment {
	a := routed(id, link, sources...)
	a.Bridged = true
	return a
}
