package agent

import (
	"errors"
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
)

// TestAutoKeepsRulesOfIPTables is a node whose pods were attached with iptables before its backend
// became "auto". Their rules stay in iptables and are repaired there until the pods end. New pods
// are redirected by nftables.
func TestAutoKeepsRulesOfIPTables(t *testing.T) {
	b := newBed(t, "iptables")
	old := b.attached(b.pod("old", 7, "10.1.0.5", "fd00:1::5"))
	b.round()
	wantCheck := func(when string, r attach.Request) {
		t.Helper()
		if differences, err := b.node.Check(t.Context(), r); err != nil || len(differences) > 0 {
			t.Errorf("%s, CHECK of %s: %q, %v", when, r.ContainerID, differences, err)
		}
	}
	b.node.Backend = "auto"
	b.round()
	b.idle("with another backend")
	wantCheck("with another backend", old)
	redirections := 0
	for line := range strings.Lines(b.AllRules()) {
		if strings.Contains(line, "-save: ") && strings.Contains(line, "old@eth0") {
			redirections++
		}
	}
	if redirections != 2 {
		t.Errorf("%d redirections in iptables, want 2:\n%s", redirections, b.AllRules())
	}

	b.attached(b.pod("new", 8, "10.1.0.6"))
	record, err := b.node.Records.Get("new", "eth0")
	b.Must(err)
	if record.Backend != "nftables" {
		t.Errorf("a new pod's rules are in %s", record.Backend)
	}
	before := b.AllRules()
	b.run("iptables -t nat -F KUBE2IAM-CNI")
	wantCheck("after a flush", b.pod("new", 8, "10.1.0.6"))
	b.round()
	if after := b.AllRules(); after != before {
		t.Errorf("repaired:\n%s\nwant\n%s", after, before)
	}
	b.Must(b.node.Detach(t.Context(), "old", "eth0"))
	if rules := b.AllRules(); strings.Contains(rules, "old@eth0") || !strings.Contains(rules, "new@eth0") {
		t.Errorf("after its DEL:\n%s", rules)
	}
	b.Logged()
	b.idle("after its DEL")
}

// TestRoundWithoutABackendRepairsWhatExists is a node whose configuration was changed to iptables,
// and that has no iptables command. The rules of its pods are in nftables and are repaired there.
func TestRoundWithoutABackendRepairsWhatExists(t *testing.T) {
	b := newBed(t, "nftables")
	b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
	b.round()
	before := b.AllRules()
	settings, system := b.node.Settings, b.node.System
	settings.Backend, system.IPTablesDirs = "iptables", []string{t.TempDir()}
	b.Close()
	b.node = attach.New(settings, system, b.Agent.log)
	b.run("nft flush map ip kube2iam-cni routed")
	if err := b.Round(t.Context()); !errors.Is(err, rules.ErrNoIPTables) {
		t.Errorf("got %v, want %v", err, rules.ErrNoIPTables)
	}
	if after := b.AllRules(); after != before {
		t.Errorf("repaired:\n%s\nwant\n%s", after, before)
	}
}
