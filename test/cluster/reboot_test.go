//go:build cluster

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// testReboot reboots the node, which loses records, rules and guard. Its first pod asks for
// credentials before agent and proxy run, and must get no answer, also not from the real service.
func testReboot(t *testing.T, n *node, c *cloud) {
	n.createPod(t, "returns")
	n.awaitPhase(t, "returns", "Running")
	served := func(ctx context.Context) error {
		role, err := n.ask(ctx, t, "returns", rolesPath)
		if err == nil && role != "team-b" {
			err = fmt.Errorf("it has the role %q", role)
		}
		return err
	}
	await(t, podLimit, "served before", served)
	started := n.must(t, "kubectl", "get", "pod", "returns", startedAt)
	c.metadata.Close()
	n.reboot(t, func() { c.start(t, n) })
	await(t, podLimit, "the pod back", func(ctx context.Context) error {
		now, err := n.output(ctx, nil, "kubectl", "get", "pod", "returns", startedAt)
		if err == nil && (now == "" || now == started) {
			err = errors.New("it is as it was")
		}
		return err
	})
	var first outcome
	await(t, podLimit, "what its first request came to", func(ctx context.Context) error {
		said, err := n.output(ctx, nil, "kubectl", "logs", "returns")
		if err == nil {
			err = json.Unmarshal([]byte(said), &first)
		}
		return err
	})
	t.Logf("its first request after the reboot: %+v", first)
	if first.Role != "" && first.Role != "team-b" {
		t.Errorf("it had the role %q", first.Role)
	}
	n.chained(t, podsConfig, "bridge", "portmap")
	await(t, podLimit, "served after", served)
	n.rolledOut(t)
	if rules := n.must(t, "nft", "list", "ruleset"); !strings.Contains(rules, `reject with tcp reset comment "reset TCP"`) {
		t.Errorf("no guard:\n%s", rules)
	}
	if records, err := os.ReadDir(n.path(stateDir + "/attachments")); err != nil || len(records) == 0 {
		t.Errorf("%d records, %v", len(records), err)
	}
	n.createPod(t, "idle")
	n.awaitPhase(t, "idle", "Running")
	if role, err := n.ask(t.Context(), t, "idle", rolesPath); err != nil || role != "team-b" {
		t.Errorf("a new pod has the role %q, %v", role, err)
	}
}

const startedAt = "--output=jsonpath={.status.containerStatuses[0].state.running.startedAt}"
