package conflist

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestUnchainRestoresTheFiles(t *testing.T) {
	for name, before := range map[string]map[string]string{
		"lists":                    {"10-a.conflist": chain("a", "bridge", "portmap"), "20-b.conflist": chain("b", "macvlan")},
		"a single plugin":          {"10-a.conf": single},
		"a single plugin in .json": {"10-a.json": single},
		"no configuration":         {},
		"an invalid file":          {"05-x.conflist": "{", "10-a.conflist": chain("a", "bridge")},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, before)
			if _, err := n.Install(); err != nil && !errors.Is(err, ErrNoNetwork) {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := Unchain(n.ConfDir, plugin); err != nil {
					t.Error(err)
				}
				n.wantFiles(before)
			}
		})
	}
}

// TestUnchainKeepsALaterConfiguration has the primary CNI write a single plugin's configuration
// after the agent ended.
func TestUnchainKeepsALaterConfiguration(t *testing.T) {
	n := newNode(t, map[string]string{"10-a.conf": single})
	if _, err := n.Install(); err != nil {
		t.Fatal(err)
	}
	n.write("10-a.conf", singlePTP)
	if _, err := Unchain(n.ConfDir, plugin); err != nil {
		t.Error(err)
	}
	n.wantFiles(map[string]string{"10-a.conf": singlePTP})
}

func TestUnchainReportsRemainingEntries(t *testing.T) {
	n := newNode(t, map[string]string{"10-a.conflist": chain("a", "bridge"), "a/50.conf": entry})
	if _, err := Unchain(n.ConfDir, plugin); err == nil || !strings.Contains(err.Error(), `["a"]`) {
		t.Errorf("an entry in the network's directory: %v", err)
	}
}

func TestEntries(t *testing.T) {
	n := newNode(t, map[string]string{
		"10-a.conflist": chain("a", "bridge"),
		"20-b.conflist": strings.Replace(chain("b", "x"), "]", `,{ "type": "kube2iam-cni", "stateDir": "/x" }]`, 1),
		"30-c.conflist": "{", "40-d.conflist": chain("d", "x"), "d/50.conf": entry,
	})
	entries, err := Entries(n.ConfDir, plugin)
	n.must(err)
	var got []map[string]any
	for _, text := range entries {
		var e map[string]any
		n.must(json.Unmarshal(text, &e))
		got = append(got, e)
	}
	want := []map[string]any{{"type": plugin, "stateDir": "/x"}, {"type": plugin}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
