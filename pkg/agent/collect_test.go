package agent

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
)

// TestCollectionContinuesAfterAFailure has a round fail after the records of attachments that are
// gone are deleted and before their rules are, in iptables, where no other rule is wanted: the next
// round removes them.
func TestCollectionContinuesAfterAFailure(t *testing.T) {
	b := newBed(t, "iptables")
	busy := filepath.Join(t.TempDir(), "busy")
	// A command that cannot delete rules, because another process holds the xtables lock.
	path, err := exec.LookPath("iptables")
	b.Must(err)
	b.write(filepath.Join(b.commands, "iptables"), "#!/bin/sh\ncase \"$*\" in *-D*) [ ! -e "+busy+" ] || exit 4;; esac\nexec "+path+` "$@"`+"\n")
	b.Must(os.Chmod(filepath.Join(b.commands, "iptables"), 0o755))
	b.attached(b.pod("c1", 7, "10.1.0.5"))
	b.node.Backend = "nftables"
	b.attached(b.pod("c2", 8, "10.1.0.6"))
	b.round()
	delete(b.links, 7)
	b.write(busy, "")
	if err := b.Round(t.Context()); !errors.Is(err, rules.ErrBusy) {
		t.Errorf("got %v, want %v", err, rules.ErrBusy)
	}
	b.Must(os.Remove(busy))
	if diff := cmp.Diff([]string{"c2@eth0"}, b.Recorded()); diff != "" {
		t.Errorf("after the round that failed:\n%s", diff)
	}
	if !strings.Contains(b.AllRules(), "c1@eth0") {
		t.Fatal("its rules are gone, and the round failed")
	}
	b.round()
	if rules := b.AllRules(); strings.Contains(rules, "c1@eth0") || !strings.Contains(rules, "c2@eth0") {
		t.Errorf("after the next round:\n%s", rules)
	}
}

// TestUnknownIsNotGone has the kernel fail to list the addresses of an interface inside a pod: the
// attachment stays until they are known.
func TestUnknownIsNotGone(t *testing.T) {
	b := newBed(t, "nftables")
	path, _ := b.macvlan("c1", "10.1.0.5")
	b.round()
	addresses := b.Addresses
	b.Addresses = func(string, string) ([]netip.Addr, error) { return nil, errors.New("too many open files") }
	b.Must(os.RemoveAll(b.Cache.Dir))
	b.round()
	if got := strings.Join(b.Recorded(), " "); got != "c1@eth0" || !strings.Contains(b.Logged(), "too many open files") {
		t.Errorf("while its addresses are unknown: records %q", got)
	}
	b.Addresses = addresses
	b.round()
	if got := strings.Join(b.Recorded(), " "); got != "c1@eth0" {
		t.Errorf("with its address: records %q", got)
	}
	b.Pods[path].IPs = nil
	b.round()
	if got := strings.Join(b.Recorded(), " "); got != "" {
		t.Errorf("without its address: records %q", got)
	}
}
