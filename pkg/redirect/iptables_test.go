package redirect

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// forms runs a test once in each form.
func forms(t *testing.T, test func(*testing.T, Form)) {
	for _, form := range []Form{NFT, Legacy} {
		t.Run(string(form), func(t *testing.T) { test(t, form) })
	}
}

const (
	filter4 = `*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
-A FORWARD -d 169.254.169.254/32 -p tcp -m comment --comment kube2iam-cni -j REJECT --reject-with tcp-reset
COMMIT`
	mangle4 = `*mangle
:PREROUTING ACCEPT
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
-A POSTROUTING -d 169.254.169.254/32 ! -p udp -m addrtype ! --src-type LOCAL -m comment --comment kube2iam-cni -j DROP
COMMIT`
	nat4 = `*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:KUBE2IAM-CNI -
-A PREROUTING -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -m comment --comment kube2iam-cni -j KUBE2IAM-CNI`
	routed4  = `-A KUBE2IAM-CNI -s 10.1.0.5/32 -d 169.254.169.254/32 -i veth0 -p tcp -m tcp --dport 80 -m comment --comment "c1@eth0" -j DNAT --to-destination 192.168.7.2:8181`
	bridged4 = `-A KUBE2IAM-CNI -s 10.1.0.6/32 -d 169.254.169.254/32 -p tcp -m physdev --physdev-in veth1 -m tcp --dport 80 -m comment --comment "c2@eth0" -j DNAT --to-destination 192.168.7.2:8181`

	tables6 = `*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
-A FORWARD -d fd00:ec2::254/128 -p tcp -m comment --comment kube2iam-cni -j REJECT --reject-with tcp-reset
COMMIT
*mangle
:PREROUTING ACCEPT
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
-A POSTROUTING -d fd00:ec2::254/128 -m addrtype ! --src-type LOCAL -m comment --comment kube2iam-cni -j DROP
COMMIT
*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:KUBE2IAM-CNI -
-A PREROUTING -d fd00:ec2::254/128 -p tcp -m tcp --dport 80 -m comment --comment kube2iam-cni -j KUBE2IAM-CNI
-A KUBE2IAM-CNI -s fd00:1::5/128 -d fd00:ec2::254/128 -i veth0 -p tcp -m tcp --dport 80 -m comment --comment "c1@eth0" -j DNAT --to-destination [fd00:7::2]:8181
COMMIT`
)

// tables puts a ruleset together as the save command of the form orders it, which is that of the tables' making.
func tables(t ...string) string { return strings.Join(t, "\n") }

func sorted(ruleset string) string {
	parts := strings.SplitAfter(ruleset, "COMMIT")
	for i := range parts {
		parts[i] = strings.Trim(parts[i], "\n")
	}
	parts = parts[:len(parts)-1]
	for i := range parts {
		for j := i + 1; j < len(parts); j++ {
			if parts[j] < parts[i] {
				parts[i], parts[j] = parts[j], parts[i]
			}
		}
	}
	return strings.Join(parts, "\n")
}

func TestAdd(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		ipt := n.iptables(form)
		n.must(ipt.Add(t.Context(), baseDual, routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")))
		n.must(ipt.Add(t.Context(), base4, bridged("c2@eth0", "veth1", "10.1.0.6")))
		want := tables(filter4, mangle4, nat4, routed4, bridged4, "COMMIT")
		if diff := cmp.Diff(want, sorted(n.rules(form, false))); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(tables6, sorted(n.rules(form, true))); diff != "" {
			t.Error(diff)
		}
	})
}

func TestAddWithoutGuard(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		base := base4
		base.Guard = false
		n.must(n.iptables(form).Add(t.Context(), base, routed("c1@eth0", "veth0", "10.1.0.5")))
		if diff := cmp.Diff(tables(nat4, routed4, "COMMIT"), sorted(n.rules(form, false))); diff != "" {
			t.Error(diff)
		}
	})
}

// TestProcesses holds the number of process runs of the steady state: a second pod on the node. iptables-legacy takes one more
// at an ADD, to see what stands above the jump.
func TestProcesses(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		saves := map[Form]int{NFT: 0, Legacy: 1}[form]
		for _, guard := range []bool{true, false} {
			n := newNamespace(t, both...)
			base, a := baseDual, routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")
			base.Guard = guard
			n.must(n.iptables(form).Add(t.Context(), base, bridged("c2@eth0", "veth1", "10.1.0.6")))
			n.must(n.iptables(form).Add(t.Context(), base, routed("c3@eth0", "veth2", "fd00:1::7")))
			n.calls()

			n.forget()
			n.must(n.iptables(form).Add(t.Context(), base, a))
			if calls := n.calls(); len(calls) != 2+2*saves {
				t.Errorf("guard %v: an ADD of both families ran\n%s", guard, strings.Join(calls, "\n"))
			}
			n.forget()
			n.must(n.Remove(form, a))
			if calls := n.calls(); len(calls) != 2 {
				t.Errorf("guard %v: a DEL of both families ran\n%s", guard, strings.Join(calls, "\n"))
			}
			n.forget()
			n.must(n.iptables(form).Add(t.Context(), Base{Metadata: base4.Metadata, Guard: guard}, routed("c4@eth0", "veth3", "10.1.0.8")))
			if calls := n.calls(); len(calls) != 1+saves {
				t.Errorf("guard %v: an ADD ran\n%s", guard, strings.Join(calls, "\n"))
			}
			n.forget()
			n.must(n.iptables(form).Add(t.Context(), base, routed("c5@eth0", "veth4", "10.1.0.9")))
			runs := 1 + saves
			if guard {
				runs++
			}
			if calls := n.calls(); len(calls) != runs {
				t.Errorf("guard %v: an ADD that redirects one family of two ran\n%s", guard, strings.Join(calls, "\n"))
			}
		}
	})
}

// TestBaseComesBack flushes the base under a running node: the next ADD makes what is missing, and only that.
func TestBaseComesBack(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		for name, flush := range map[string][]string{
			"nothing":       nil,
			"nat":           {"-t nat -F", "-t nat -X"},
			"mangle":        {"-t mangle -F"},
			"both":          {"-t nat -F", "-t nat -X", "-t mangle -F"},
			"all":           {"-t nat -F", "-t nat -X", "-t mangle -F", "-F"},
			"jump and rest": {"-t nat -F PREROUTING", "-t mangle -F", "-F"},
		} {
			t.Run(name, func(t *testing.T) {
				n := newNamespace(t, both...)
				ipt := n.iptables(form)
				a := routed("c1@eth0", "veth0", "10.1.0.5")
				n.must(ipt.Add(t.Context(), base4, a))
				n.must(n.Remove(form, a))
				for _, f := range flush {
					n.run(string(form) + " " + f)
				}
				n.must(ipt.Add(t.Context(), base4, a))
				if diff := cmp.Diff(tables(filter4, mangle4, nat4, routed4, "COMMIT"), sorted(n.rules(form, false))); diff != "" {
					t.Error(diff)
				}
			})
		}
	})
}

// TestFlushedTable flushes one table under a running pod, whose own redirection is not the matter of another's ADD.
func TestFlushedTable(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		for table, want := range map[string]string{
			"nat":    tables(filter4, mangle4, nat4, bridged4, "COMMIT"),
			"mangle": tables(filter4, mangle4, nat4, routed4, bridged4, "COMMIT"),
			"filter": tables(filter4, mangle4, nat4, routed4, bridged4, "COMMIT"),
		} {
			t.Run(table, func(t *testing.T) {
				n := newNamespace(t, both...)
				n.must(n.iptables(form).Add(t.Context(), base4, routed("c1@eth0", "veth0", "10.1.0.5")))
				n.run(string(form) + " -t " + table + " -F")
				n.must(n.iptables(form).Add(t.Context(), base4, bridged("c2@eth0", "veth1", "10.1.0.6")))
				if diff := cmp.Diff(want, sorted(n.rules(form, false))); diff != "" {
					t.Error(diff)
				}
			})
		}
		t.Run("filter, then nat", func(t *testing.T) {
			n := newNamespace(t, both...)
			n.must(n.iptables(form).Add(t.Context(), base4, routed("c1@eth0", "veth0", "10.1.0.5")))
			n.run(string(form) + " -t filter -F")
			n.run(string(form) + " -t nat -F")
			n.must(n.iptables(form).Add(t.Context(), base4, bridged("c2@eth0", "veth1", "10.1.0.6")))
			if diff := cmp.Diff(tables(filter4, mangle4, nat4, bridged4, "COMMIT"), sorted(n.rules(form, false))); diff != "" {
				t.Error(diff)
			}
		})
	})
}

// TestGuardOnly is a family that is guarded and not redirected.
func TestGuardOnly(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		a := routed("c1@eth0", "veth0", "10.1.0.5")
		n.must(n.iptables(form).Add(t.Context(), baseDual, a))
		guard, _, _ := strings.Cut(tables6, "\n*nat")
		if diff := cmp.Diff(guard, sorted(n.rules(form, true))); diff != "" {
			t.Error(diff)
		}
		missing := func(want ...string) {
			t.Helper()
			got, err := n.iptables(form).Missing(baseDual, a)
			n.must(err)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		}
		missing()
		n.run(strings.Replace(string(form), "iptables", "ip6tables", 1) + " -t mangle -F")
		missing("guard in mangle POSTROUTING")
		n.must(n.iptables(form).Add(t.Context(), baseDual, a))
		missing()
	})
}

// TestOneFamily is a node whose iptables is for IPv4 only.
func TestOneFamily(t *testing.T) {
	n := newNamespace(t, "iptables-nft")
	if err := n.iptables(NFT).Open(baseDual, routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")); !errors.Is(err, ErrNoIPTables) {
		t.Errorf("got %v, want %v", err, ErrNoIPTables)
	}
	n.calls()
	n.must(n.iptables(NFT).Open(base4, routed("c1@eth0", "veth0", "10.1.0.5")))
	if calls := n.calls(); calls != nil {
		t.Errorf("asked again: %v", calls)
	}
}

// TestBaseStandsFirst has others' rules in all the places where ours go.
func TestBaseStandsFirst(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		foreign(n, form)
		n.must(n.iptables(form).Add(t.Context(), base4, routed("c1@eth0", "veth0", "10.1.0.5")))
		for place, rule := range map[string]string{
			"filter FORWARD":     "-j REJECT --reject-with tcp-reset",
			"mangle POSTROUTING": "-j DROP",
			"nat PREROUTING":     "-j KUBE2IAM-CNI",
		} {
			table, chain, _ := strings.Cut(place, " ")
			first := strings.TrimSpace(n.run(string(form) + " -t " + table + " -S " + chain + " 1"))
			if !strings.HasSuffix(first, rule) {
				t.Errorf("%s begins with %q, want %q", place, first, rule)
			}
		}
	})
}

// foreign makes rules of other programs, some of which speak of the metadata service too, or look like ours.
func foreign(n *namespace, form Form) {
	n.Helper()
	for _, rule := range []string{
		"-t nat -N KUBE-SERVICES",
		"-t nat -A PREROUTING -m comment --comment kube -j KUBE-SERVICES",
		"-t nat -A PREROUTING -d 169.254.169.254/32 -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8181",
		"-t nat -A KUBE-SERVICES -s 10.1.0.5/32 -d 169.254.169.254/32 -i veth0 -p tcp -m tcp --dport 80 -m comment --comment c1@eth0 -j DNAT --to-destination 192.168.7.2:8181",
		"-t filter -A FORWARD -j ACCEPT",
		"-t mangle -A POSTROUTING -j ACCEPT",
	} {
		n.run(string(form) + " " + rule)
	}
}

// TestForeignRulesSurvive compares all rules, byte for byte, before an ADD and after its DEL on a node that has the base.
func TestForeignRulesSurvive(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		foreign(n, NFT)
		foreign(n, Legacy)
		neighbour := routed("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")
		n.must(n.iptables(form).Add(t.Context(), baseDual, neighbour))
		before := n.everything()

		a := routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")
		n.must(n.iptables(form).Add(t.Context(), baseDual, a))
		if n.everything() == before {
			t.Error("ADD changed nothing")
		}
		n.must(n.Remove(form, a))
		if diff := cmp.Diff(before, n.everything()); diff != "" {
			t.Errorf("after DEL:\n%s", diff)
		}
		n.must(n.Remove(form, a))
		n.must(n.RemoveLeftovers(a.ID))
		if diff := cmp.Diff(before, n.everything()); diff != "" {
			t.Errorf("after three DELs:\n%s", diff)
		}
	})
}

// TestLockIsBounded holds the xtables lock, which only the legacy form takes.
func TestLockIsBounded(t *testing.T) {
	n := newNamespace(t, both...)
	a := routed("c1@eth0", "veth0", "10.1.0.5")
	n.must(n.iptables(Legacy).Add(t.Context(), base4, a))
	lock, err := os.OpenFile(os.Getenv("XTABLES_LOCKFILE"), os.O_CREATE|os.O_RDWR, 0o600)
	n.must(err)
	defer lock.Close()
	n.must(syscall.Flock(int(lock.Fd()), syscall.LOCK_EX))
	n.calls()
	if err := n.Remove(Legacy, a); !errors.Is(err, ErrBusy) {
		t.Errorf("DEL: got %v, want %v", err, ErrBusy)
	}
	for _, call := range n.calls() {
		if !strings.HasSuffix(call, " --wait 5") {
			t.Errorf("the wait is not bounded: %s", call)
		}
	}
}

func TestMissing(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		a := routed("c1@eth0", "veth0", "10.1.0.5")
		for name, tc := range map[string]struct {
			break_ []string
			want   []string
		}{
			"nothing":      {nil, nil},
			"redirection":  {[]string{"-t nat -F KUBE2IAM-CNI"}, []string{"redirection of 10.1.0.5 to 192.168.7.2:8181"}},
			"jump":         {[]string{"-t nat -F PREROUTING"}, []string{"jump to KUBE2IAM-CNI"}},
			"chain":        {[]string{"-t nat -F", "-t nat -X"}, []string{"jump to KUBE2IAM-CNI", "redirection of 10.1.0.5 to 192.168.7.2:8181"}},
			"quick guard":  {[]string{"-F"}, []string{"guard in filter FORWARD"}},
			"second guard": {[]string{"-t mangle -F"}, []string{"guard in mangle POSTROUTING"}},
		} {
			t.Run(name, func(t *testing.T) {
				n := newNamespace(t, both...)
				n.must(n.iptables(form).Add(t.Context(), base4, a))
				for _, b := range tc.break_ {
					n.run(string(form) + " " + b)
				}
				before := n.everything()
				got, err := n.iptables(form).Missing(base4, a)
				n.must(err)
				if diff := cmp.Diff(tc.want, got); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff(before, n.everything()); diff != "" {
					t.Errorf("asking changed the rules:\n%s", diff)
				}
			})
		}
	})
}
