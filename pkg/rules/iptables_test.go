package rules

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// withoutNFTables makes the kernel answer as one without nftables: a read with EINVAL, and a batch
// with EOPNOTSUPP.
func (h *host) withoutNFTables() {
	h.ConnOptions = []nftables.ConnOption{nftables.WithTestDial(func(request []netlink.Message) ([]netlink.Message, error) {
		if len(request) > 0 && request[0].Header.Type == unix.NFNL_MSG_BATCH_BEGIN {
			return nil, unix.EOPNOTSUPP
		}
		return nil, unix.EINVAL
	})}
}

// forEachForm runs a test with the node's iptables in its nft form, and in its legacy form on a
// kernel without nftables. save returns the rules of one family as the form's save command writes
// them.
func forEachForm(t *testing.T, test func(t *testing.T, h *host, save func(v6 bool) string)) {
	for _, form := range []string{"nft", "legacy"} {
		t.Run(form, func(t *testing.T) {
			h := newHost(t)
			if form == "legacy" {
				h.withoutNFTables()
			}
			test(t, h, func(v6 bool) string {
				command := "iptables-" + form + "-save"
				if v6 {
					command = "ip6tables-" + form + "-save"
				}
				var lines []string
				for line := range strings.Lines(h.run(command)) {
					if strings.HasPrefix(line, "-A") || strings.HasPrefix(line, "*") || strings.HasPrefix(line, ":"+IPTablesChain) {
						line, _, _ = strings.Cut(line, " [")
						lines = append(lines, strings.TrimSpace(line))
					}
				}
				return strings.Join(lines, "\n")
			})
		})
	}
}

const (
	iptablesRedirect = `-A KUBE2IAM-CNI -s 10.1.0.5/32 -d 169.254.169.254/32 -i veth0 -p tcp -m tcp --dport 80 -m comment --comment "c1@eth0" -j DNAT --to-destination 192.168.7.2:8181`
	iptablesBridged  = `-A KUBE2IAM-CNI -s 10.1.0.6/32 -d 169.254.169.254/32 -p tcp -m physdev --physdev-in veth1 -m tcp --dport 80 -m comment --comment "c2@eth0" -j DNAT --to-destination 192.168.7.2:8181`
	iptablesJump     = `-A PREROUTING -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -m comment --comment kube2iam-cni -j KUBE2IAM-CNI`
	iptablesReject   = `-A FORWARD -d 169.254.169.254/32 -p tcp -m comment --comment kube2iam-cni -j REJECT --reject-with tcp-reset`
	iptablesDrop     = `-A POSTROUTING -d 169.254.169.254/32 ! -p udp -m addrtype ! --src-type LOCAL -m comment --comment kube2iam-cni -j DROP`
)

func wantLines(t *testing.T, when, rules string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if n := strings.Count(rules, line); n != 1 {
			t.Errorf("%s: %d of %s in\n%s", when, n, line, rules)
		}
	}
}

func TestIPTablesAttachAndDetach(t *testing.T) {
	forEachForm(t, func(t *testing.T, h *host, save func(bool) string) {
		r, neighbour := withIPTables(routed("c1", "veth0", "10.1.0.5")), withIPTables(bridged("c2", "veth1", "10.1.0.6"))
		for range 2 { // a second ADD changes nothing
			h.must(h.Attach(t.Context(), r, nil))
			h.must(h.Attach(t.Context(), neighbour, nil))
		}
		wantLines(t, "after ADD", save(false), iptablesRedirect, iptablesBridged, iptablesJump)
		guard := []string{iptablesReject, iptablesDrop}
		if h.ConnOptions == nil {
			guard = nil
			if !strings.Contains(h.ruleset(), "chain guard") {
				t.Error("no guard in nftables")
			}
		}
		wantLines(t, "after ADD", save(false), guard...)
		if len(guard) > 0 && !strings.Contains(save(true), "-A POSTROUTING -d fd00:ec2::254/128 -m addrtype ! --src-type LOCAL -m comment --comment kube2iam-cni -j DROP") {
			t.Errorf("IPv6 is not guarded:\n%s", save(true))
		}
		if changes, err := h.Check(t.Context(), r); err != nil || len(changes) > 0 {
			t.Errorf("Check: %v, %v", changes, err)
		}
		h.must(h.Detach(t.Context(), r))
		h.must(h.detachID(neighbour.ID()))
		if rules := save(false); strings.Contains(rules, "@eth0") {
			t.Errorf("after DEL:\n%s", rules)
		}
		wantLines(t, "after DEL", save(false), append(guard, iptablesJump)...)
	})
}

// TestIPTablesReconcile damages the rules; a dry run changes nothing.
func TestIPTablesReconcile(t *testing.T) {
	forEachForm(t, func(t *testing.T, h *host, save func(bool) string) {
		command := "iptables-nft"
		if h.ConnOptions != nil {
			command = "iptables-legacy"
		}
		records := []*attachment.Record{withIPTables(routed("c1", "veth0", "10.1.0.5"))}
		reconcile := func(dryRun bool) []string {
			changes, err := h.Reconcile(t.Context(), records, attachment.BackendIPTables, dryRun)
			h.must(err)
			return changeStrings(changes)
		}
		reconcile(false)
		whole := save(false)
		wantLines(t, "after Reconcile", whole, iptablesRedirect, iptablesJump)
		for damage, want := range map[string][]string{
			"-t nat -F KUBE2IAM-CNI": {"missing: redirection of 10.1.0.5 to 192.168.7.2:8181 (iptables)"},
			"-t nat -F PREROUTING":   {"missing: jump to KUBE2IAM-CNI (iptables)"},
			"-t nat -A " + strings.NewReplacer("-A ", "", "10.1.0.5", "10.1.0.9", "c1", "c9").Replace(iptablesRedirect): {"stale: redirection of c9@eth0 (iptables)"},
		} {
			h.run(command + " " + damage)
			damaged := save(false)
			if diff := cmp.Diff(want, reconcile(true)); diff != "" {
				t.Errorf("%s: dry run (-want +got):\n%s", damage, diff)
			}
			if diff := cmp.Diff(damaged, save(false)); diff != "" {
				t.Errorf("%s: the dry run changed rules:\n%s", damage, diff)
			}
			if diff := cmp.Diff(want, reconcile(false)); diff != "" {
				t.Errorf("%s: (-want +got):\n%s", damage, diff)
			}
			if diff := cmp.Diff(whole, save(false)); diff != "" {
				t.Errorf("%s: after Reconcile:\n%s", damage, diff)
			}
			if again := reconcile(false); len(again) > 0 {
				t.Errorf("%s: a second Reconcile: %v", damage, again)
			}
		}
	})
}

// TestIPTablesUninstall removes this project's rules and chain, and no other.
func TestIPTablesUninstall(t *testing.T) {
	forEachForm(t, func(t *testing.T, h *host, save func(bool) string) {
		command := "iptables-nft"
		if h.ConnOptions != nil {
			command = "iptables-legacy"
		}
		h.run(command + " -t nat -A PREROUTING -p tcp --dport 80 -m comment --comment mine -j ACCEPT")
		h.run(command + " -t filter -A FORWARD -j ACCEPT")
		before := strings.ReplaceAll(save(false), "*mangle", "")
		h.must(h.Attach(t.Context(), withIPTables(routed("c1", "veth0", "10.1.0.5")), nil))
		for range 2 {
			h.must(h.Uninstall(t.Context()))
			if diff := cmp.Diff(strings.Fields(before), strings.Fields(strings.ReplaceAll(save(false), "*mangle", ""))); diff != "" {
				t.Errorf("after Uninstall (-before +after):\n%s", diff)
			}
		}
	})
}

// TestChangedBackend removes the rules of a backend that the node no longer uses.
func TestChangedBackend(t *testing.T) {
	h := newHost(t)
	h.must(h.Attach(t.Context(), withIPTables(routed("c1", "veth0", "10.1.0.5")), nil))
	h.must(h.Attach(t.Context(), routed("c1", "veth0", "10.1.0.5"), withIPTables(routed("c1", "veth0", "10.1.0.5"))))
	if rules := h.run("iptables-save"); strings.Contains(rules, "c1@eth0") {
		t.Errorf("after ADD with nftables:\n%s", rules)
	}
	h.must(h.Attach(t.Context(), withIPTables(routed("c2", "veth1", "10.1.0.6")), nil))
	changes, err := h.Reconcile(t.Context(), []*attachment.Record{routed("c1", "veth0", "10.1.0.5")}, attachment.BackendNFTables, false)
	h.must(err)
	if diff := cmp.Diff([]string{"stale: redirection of c2@eth0 (iptables)"}, changeStrings(changes)); diff != "" {
		t.Error(diff)
	}
}

// TestIPTablesBesideUnlistedRules has a rule of another program that iptables-nft cannot read in
// each of the chains: ADD, CHECK and a second ADD work.
func TestIPTablesBesideUnlistedRules(t *testing.T) {
	h := newHost(t)
	h.run("iptables-nft -t nat -A PREROUTING -j ACCEPT")
	h.run("nft add rule ip nat PREROUTING ip daddr { 10.9.0.1, 10.9.0.2 } counter accept")
	r := withIPTables(routed("c1", "veth0", "10.1.0.5"))
	for range 3 {
		h.must(h.Attach(t.Context(), r, nil))
	}
	if changes, err := h.Check(t.Context(), r); err != nil || len(changes) > 0 {
		t.Errorf("Check: %v, %v", changes, err)
	}
	if n := strings.Count(h.run("nft list chain ip nat PREROUTING"), IPTablesChain); n != 1 {
		t.Errorf("%d jumps, want 1", n)
	}
}

func TestChooseBackend(t *testing.T) {
	for name, tc := range map[string]struct {
		configured  string
		hasNFTables bool
		commands    []string
		want        attachment.Backend
		wantErr     error
		wantAlso    error
	}{
		"auto":                                 {configured: "auto", hasNFTables: true, want: attachment.BackendNFTables},
		"auto, no nftables":                    {configured: "auto", commands: []string{"iptables"}, want: attachment.BackendIPTables},
		"auto, neither":                        {configured: "auto", wantErr: ErrNoIPTables, wantAlso: ErrUnsupported},
		"nftables":                             {configured: "nftables", hasNFTables: true, want: attachment.BackendNFTables},
		"nftables, no nftables":                {configured: "nftables", commands: []string{"iptables"}, wantErr: ErrUnsupported},
		"iptables":                             {configured: "iptables", hasNFTables: true, commands: []string{"iptables"}, want: attachment.BackendIPTables},
		"iptables without a command":           {configured: "iptables", hasNFTables: true, wantErr: ErrNoIPTables},
		"iptables, the legacy command alone":   {configured: "iptables", commands: []string{"iptables-legacy"}, want: attachment.BackendIPTables},
		"iptables, legacy alone, has nftables": {configured: "iptables", hasNFTables: true, commands: []string{"iptables-legacy"}, wantErr: ErrNoIPTables},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.iptables.dirs = []string{t.TempDir()}
			for _, command := range tc.commands {
				h.must(os.WriteFile(filepath.Join(h.iptables.dirs[0], command), nil, 0o755))
			}
			if !tc.hasNFTables {
				h.withoutNFTables()
			}
			got, err := h.ChooseBackend(t.Context(), tc.configured)
			if !errors.Is(err, tc.wantErr) || tc.wantErr == nil && (err != nil || got != tc.want) || !errors.Is(err, tc.wantAlso) && tc.wantAlso != nil {
				t.Errorf("got %q, %v; want %q, %v", got, err, tc.want, tc.wantErr)
			}
		})
	}
}

// TestUnguardedFamilyIsLogged has a kernel without nftables on a node without ip6tables: IPv6 is
// not guarded, which is logged, and IPv4 pods are attached.
func TestUnguardedFamilyIsLogged(t *testing.T) {
	h := newHost(t)
	h.withoutNFTables()
	real, err := h.iptables.find(t.Context(), h.Node, ipv4)
	h.must(err)
	h.iptables.dirs = []string{t.TempDir()}
	h.must(os.Symlink(real, filepath.Join(h.iptables.dirs[0], "iptables-legacy")))
	r := withIPTables(routed("c1", "veth0", "10.1.0.5"))
	h.must(h.Attach(t.Context(), r, nil))
	if log := h.log.String(); !strings.Contains(log, "[fd00:ec2::254]:80") || strings.Contains(log, "169.254") {
		t.Errorf("log: %s", log)
	}
	dual := withIPTables(routed("c2", "veth1", "10.1.0.6", "fd00:1::6"))
	if err := h.Attach(t.Context(), dual, nil); !errors.Is(err, ErrNoIPTables) {
		t.Errorf("a pod of IPv6: %v, want %v", err, ErrNoIPTables)
	}
}

// TestKernelWithoutNFTables has no rules to remove with nftables, and cannot attach with it.
func TestKernelWithoutNFTables(t *testing.T) {
	h := newHost(t)
	h.withoutNFTables()
	r := routed("c1", "veth0", "10.1.0.5")
	if err := h.Attach(t.Context(), r, nil); !errors.Is(err, ErrUnsupported) || errors.Is(err, ErrBusy) {
		t.Errorf("ADD: %v", err)
	}
	h.must(h.Detach(t.Context(), r))
	h.must(h.detachID(r.ID()))
	h.must(h.Uninstall(t.Context()))
}

// TestIPTablesLockIsBounded has another process hold the xtables lock: the error is ErrBusy.
func TestIPTablesLockIsBounded(t *testing.T) {
	h := newHost(t)
	h.withoutNFTables()
	lock, err := os.Create(os.Getenv("XTABLES_LOCKFILE"))
	h.must(err)
	defer lock.Close()
	h.must(unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	if err := h.Attach(t.Context(), withIPTables(routed("c1", "veth0", "10.1.0.5")), nil); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v, want %v", err, ErrBusy)
	}
}

// TestGuardIsMadeFirst has the changes of a node's first ADD: whenever the jump exists, the guard
// exists.
func TestGuardIsMadeFirst(t *testing.T) {
	h := newHost(t)
	h.withoutNFTables()
	h.IPv6 = false
	changes, err := h.Check(t.Context(), withIPTables(routed("c1", "veth0", "10.1.0.5")))
	h.must(err)
	var order []string
	for _, c := range changes {
		order = append(order, c.Object)
	}
	want := []string{
		"guard in filter FORWARD (iptables)", "guard in mangle POSTROUTING (iptables)", "guard in mangle FORWARD (iptables)", "chain KUBE2IAM-CNI (iptables)",
		"jump to KUBE2IAM-CNI (iptables)", "redirection of 10.1.0.5 to 192.168.7.2:8181 (iptables)",
	}
	if diff := cmp.Diff(want, order); diff != "" {
		t.Error(diff)
	}
}
