package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

var addresses = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
}

// idle asserts that a round finds nothing to do: it changes no rule and no file, cuts nothing and
// says nothing.
func (b *bed) idle(when string) {
	b.Helper()
	b.Logged()
	b.cut()
	rules, files := b.AllRules(), b.files()
	b.round()
	if diff := cmp.Diff(rules, b.AllRules()); diff != "" {
		b.Errorf("%s, a round changed the rules:\n%s", when, diff)
	}
	if diff := cmp.Diff(files, b.files()); diff != "" {
		b.Errorf("%s, a round wrote:\n%s", when, diff)
	}
	if cuts := b.cut(); cuts != nil {
		b.Errorf("%s, a round cut connections to %v", when, cuts)
	}
	if logged := b.Logged(); logged != "" {
		b.Errorf("%s, a round logged %s", when, logged)
	}
}

// wantCut asserts that both services' connections were cut, once.
func (b *bed) wantCut(when string) {
	b.Helper()
	if diff := cmp.Diff(services, b.cut(), addresses); diff != "" {
		b.Errorf("%s, what was cut:\n%s", when, diff)
	}
}

// TestRoundGuards makes the guard on a node without pods.
func TestRoundGuards(t *testing.T) {
	testhost.Backends(t, func(t *testing.T, backend string) {
		b := newBed(t, backend)
		b.round()
		b.wantCut("after the first round")
		for _, guarded := range []string{"169.254.169.254", "fd00:ec2::254"} {
			if rules := b.AllRules(); !strings.Contains(rules, guarded) {
				t.Errorf("%s is not guarded:\n%s", guarded, rules)
			}
		}
		b.idle("guarded")

		r := b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
		b.idle("with a pod")
		b.Must(b.node.Detach(t.Context(), r.ContainerID, r.IfName))
		b.idle("after its DEL")
		if rules := b.AllRules(); strings.Contains(rules, r.ContainerID+"@") || !strings.Contains(rules, "fd00:ec2::254") {
			t.Errorf("after its DEL:\n%s", rules)
		}
	})
}

// TestRoundCollects removes records and rules of an attachment without a DEL, and nothing of a pod
// whose interface exists.
func TestRoundCollects(t *testing.T) {
	for name, vanish := range map[string]func(*bed, int){
		"the interface is gone":  func(b *bed, index int) { delete(b.links, index) },
		"its index is another's": func(b *bed, index int) { b.links[index] = "veth99" },
		"its name is another's":  func(b *bed, index int) { b.links[99] = b.links[index]; delete(b.links, index) },
	} {
		t.Run(name, func(t *testing.T) {
			testhost.Backends(t, func(t *testing.T, backend string) {
				b := newBed(t, backend)
				b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
				b.round()
				before, files := b.AllRules(), b.files()
				b.attached(b.pod("c2", 8, "10.1.0.6", "fd00:1::6"))
				b.idle("with both")
				vanish(b, 8)
				b.round()
				if diff := cmp.Diff(before, b.AllRules()); diff != "" {
					t.Errorf("after the round:\n%s", diff)
				}
				if diff := cmp.Diff([]string{"c1@eth0"}, b.Recorded()); diff != "" {
					t.Errorf("after the round:\n%s", diff)
				}
				for _, kept := range []string{"/attachments/c1@eth0.json", "/by-ip/10.1.0.5", "/by-ip/fd00:1::5"} {
					if after := b.files()[kept]; after != files[kept] {
						t.Errorf("%s was %s and is %s", kept, files[kept], after)
					}
				}
				if logged := b.Logged(); !strings.Contains(logged, "collecting an attachment that is gone") || !strings.Contains(logged, "c2@eth0") || strings.Contains(logged, "c1@eth0") {
					t.Errorf("the log is %s", logged)
				}
				if cuts := b.cut(); len(cuts) > 0 {
					t.Errorf("cut connections to %v", cuts)
				}
				b.idle("after the collection")
			})
		})
	}
}

// TestRoundRepairs makes flushed rules again.
func TestRoundRepairs(t *testing.T) {
	// What is run: a command of iptables of the backend's form for each family, or nft for what is
	// the same there.
	for name, tc := range map[string]struct{ iptables, nft []string }{
		"everything":              {[]string{"-F", "-t mangle -F", "-t nat -F", "-t nat -X"}, []string{"flush ruleset"}},
		"one rule of each family": {[]string{"-t nat -D KUBE2IAM-CNI 1"}, []string{"flush map ip kube2iam-cni routed", "flush map ip6 kube2iam-cni routed"}},
		"the guard":               {nil, []string{"flush chain ip kube2iam-cni guard", "delete chain ip6 kube2iam-cni guard"}},
	} {
		t.Run(name, func(t *testing.T) {
			testhost.Backends(t, func(t *testing.T, backend string) {
				b := newBed(t, backend)
				b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
				b.attached(b.pod("c2", 8, "10.1.0.6", "fd00:1::6"))
				b.round()
				before, files := b.AllRules(), b.files()
				if backend == "nftables" || tc.iptables == nil { // the guard is in nftables with either backend
					for _, args := range tc.nft {
						b.run("nft " + args)
					}
				} else {
					for _, args := range tc.iptables {
						b.run(backend + " " + args)
						b.run(strings.Replace(backend, "iptables", "ip6tables", 1) + " " + args)
					}
				}
				if b.AllRules() == before {
					t.Fatal("nothing was flushed")
				}
				b.Logged()
				b.cut()
				b.round()
				if diff := cmp.Diff(before, b.AllRules()); diff != "" {
					t.Errorf("after the round:\n%s", diff)
				}
				if diff := cmp.Diff(files, b.files()); diff != "" {
					t.Errorf("the records are as they should be, and the round wrote:\n%s", diff)
				}
				b.wantCut("after the repair")
				if logged := b.Logged(); strings.Count(logged, "repaired the node's rules") == 0 && strings.Count(logged, "made the guard") != 1 {
					t.Errorf("the log is %s", logged)
				}
				b.idle("after the repair")
			})
		})
	}
}

// TestRoundRemovesRulesWithoutARecord has a record that is lost or cannot be read: its rules are
// removed.
func TestRoundRemovesRulesWithoutARecord(t *testing.T) {
	for name, lose := range map[string]func(*bed) error{
		"lost": func(b *bed) error { return os.Remove(filepath.Join(b.node.StateDir, "attachments", "c2@eth0.json")) },
		"unreadable": func(b *bed) error {
			return os.Truncate(filepath.Join(b.node.StateDir, "attachments", "c2@eth0.json"), 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			testhost.Backends(t, func(t *testing.T, backend string) {
				b := newBed(t, backend)
				b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
				b.round()
				before := b.AllRules()
				b.attached(b.pod("c2", 8, "10.1.0.6", "fd00:1::6"))
				b.Must(lose(b))
				b.round()
				if diff := cmp.Diff(before, b.AllRules()); diff != "" {
					t.Errorf("after the round:\n%s", diff)
				}
				if logged := strings.Count(b.Logged(), "records that cannot be read"); logged != strings.Count(name, "unreadable") {
					t.Errorf("logged %d times", logged)
				}
				b.idle("after the round")
			})
		})
	}
}
