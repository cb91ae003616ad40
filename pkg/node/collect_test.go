package node

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// counted gives the node commands of iptables that note each run.
func (b *bed) counted(form string) (runs func() int) {
	b.Helper()
	dir := b.TempDir()
	for _, name := range []string{form, strings.Replace(form, "iptables", "ip6tables", 1)} {
		for _, with := range []string{"", "-restore", "-save"} {
			b.write(filepath.Join(dir, name+with), "#!/bin/sh\necho run >>"+dir+"/log\nexec "+name+with+` "$@"`+"\n")
			b.must(os.Chmod(filepath.Join(dir, name+with), 0o755))
		}
	}
	b.Node.Dirs = []string{dir}
	b.rules.Dirs = []string{dir}
	return func() int {
		data, _ := os.ReadFile(filepath.Join(dir, "log"))
		os.Remove(filepath.Join(dir, "log"))
		return strings.Count(string(data), "run")
	}
}

// TestCollectingManyTakesNoMoreRunsThanOne has pods end without a DEL: how long ADDs are held off does not grow with them.
func TestCollectingManyTakesNoMoreRunsThanOne(t *testing.T) {
	for _, form := range []string{"iptables-nft", "iptables-legacy"} {
		t.Run(form, func(t *testing.T) {
			b := newBed(t, form)
			runs := b.counted(form)
			b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
			b.round()
			before := b.allRules()
			end := func(pods int) int {
				for i := range pods {
					b.attached(b.pod(fmt.Sprintf("d%d", i), 100+i, fmt.Sprintf("10.2.0.%d", i), fmt.Sprintf("fd00:2::%d", i)))
				}
				for i := range pods {
					delete(b.links, 100+i)
				}
				runs()
				b.round()
				if diff := cmp.Diff(before, b.allRules()); diff != "" {
					t.Errorf("after the end of %d pods:\n%s", pods, diff)
				}
				if diff := cmp.Diff([]string{"c1@eth0"}, b.recorded()); diff != "" {
					t.Errorf("after the end of %d pods:\n%s", pods, diff)
				}
				return runs()
			}
			if one, many := end(1), end(60); many > one {
				t.Errorf("%d runs for 60, %d for one", many, one)
			}
		})
	}
}

// TestCollectingIsTakenUpAgain has a round fail when the records of those that are gone are deleted and their rules are not, of
// a form that nothing else is looked for in: the next round finds them by what they carry.
func TestCollectingIsTakenUpAgain(t *testing.T) {
	b := newBed(t, "iptables-legacy")
	b.attached(b.pod("c1", 7, "10.1.0.5"))
	b.Backend = "nftables"
	b.attached(b.pod("c2", 8, "10.1.0.6"))
	b.round()
	delete(b.links, 7)
	// Somebody holds the lock of iptables for longer than the agent waits.
	lock, err := os.OpenFile(os.Getenv("XTABLES_LOCKFILE"), os.O_CREATE|os.O_RDONLY, 0o600)
	b.must(err)
	b.must(unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	if err := b.Round(t.Context()); err == nil {
		t.Error("the round did not fail")
	}
	b.must(lock.Close())
	if diff := cmp.Diff([]string{"c2@eth0"}, b.recorded()); diff != "" {
		t.Errorf("after the round that failed:\n%s", diff)
	}
	if !strings.Contains(b.allRules(), "c1@eth0") {
		t.Fatal("its rules went, and the round failed")
	}
	b.round()
	if rules := b.allRules(); strings.Contains(rules, "c1@eth0") || !strings.Contains(rules, "c2@eth0") {
		t.Errorf("after the next round:\n%s", rules)
	}
}

// TestUnknownIsNotGone has the kernel not say what an interface inside a pod holds: the attachment stays until it does.
func TestUnknownIsNotGone(t *testing.T) {
	b := newBed(t, "nftables")
	r := b.attached(b.pod("c1", 7, "10.1.0.5"))
	record, err := b.records().Get(r.ContainerID, r.IfName)
	b.must(err)
	record.HostLink.Index, record.HostLink.Name, record.Datapath = 0, "", "pod"
	addresses := b.Addresses
	b.Addresses = func(string, string) ([]netip.Addr, error) { return nil, errors.New("too many open files") }
	if gone, err := b.isGoneInPod(record); gone || err == nil {
		t.Errorf("gone %v, %v", gone, err)
	}
	b.Addresses = addresses
	if gone, err := b.isGoneInPod(record); gone || err != nil {
		t.Errorf("gone %v, %v", gone, err)
	}
	b.pods[r.Netns].IPs = slices.DeleteFunc(b.pods[r.Netns].IPs, func(netip.Addr) bool { return true })
	if gone, err := b.isGoneInPod(record); !gone || err != nil {
		t.Errorf("without its address: gone %v, %v", gone, err)
	}
}
