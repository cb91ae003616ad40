package conflist

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

func configOf(path string, plugins ...string) *config {
	c := &config{path: path, list: &libcni.NetworkConfigList{}}
	for _, p := range plugins {
		c.list.Plugins = append(c.list.Plugins, &libcni.PluginConfig{Network: &types.PluginConf{Type: p}})
	}
	return c
}

func TestConflict(t *testing.T) {
	const second = time.Second
	for name, tc := range map[string]struct {
		additions []time.Duration // since the start
		backoff   time.Duration   // after the last one
	}{
		"a few upgrades":              {[]time.Duration{0, second, 2 * second, 3 * second}, 0},
		"one every three seconds":     {[]time.Duration{0, 3 * second, 6 * second, 9 * second, 12 * second, 15 * second}, 0},
		"five at once":                {[]time.Duration{0, 1, 2, 3, 4}, 10 * second},
		"a removal after the retry":   {[]time.Duration{0, 1, 2, 3, 4, 11 * second, 12 * second}, 20 * second},
		"one after the next retry":    {[]time.Duration{0, 1, 2, 3, 4, 11 * second, 12 * second, 33 * second, 34 * second}, 40 * second},
		"peace after the retry":       {[]time.Duration{0, 1, 2, 3, 4, 11 * second, 22 * second}, 0},
		"another conflict after that": {[]time.Duration{0, 1, 2, 3, 4, 11 * second, 60 * second, 61 * second, 62 * second, 63 * second, 64 * second}, 10 * second},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			var x conflict
			isConflict := false
			for _, at := range tc.additions {
				now := start.Add(at)
				c := configOf("10-a.conflist", "bridge")
				if err := x.waits(now, c); err != nil {
					t.Fatalf("added after %s, during the wait", at)
				}
				isConflict = x.observe(now, c, plugin)
			}
			if isConflict != (tc.backoff > 0) || isConflict && x.backoff != tc.backoff {
				t.Errorf("conflict is %v with a wait of %s, want %s", isConflict, x.backoff, tc.backoff)
			}
		})
	}
}

// TestAnotherTextIsNoConflict has an upgrade during a conflict: its text gets the entry immediately.
func TestAnotherTextIsNoConflict(t *testing.T) {
	var x conflict
	now := time.Now()
	c := configOf("10-a.conflist", "bridge")
	c.list.Bytes = []byte("first")
	for range maxAdditions + 1 {
		x.observe(now, c, plugin)
	}
	if err := x.waits(now, c); !errors.Is(err, ErrConflict) {
		t.Errorf("the text in conflict: %v", err)
	}
	for _, other := range []*config{configOf("10-a.conflist", "bridge"), configOf("05-b.conflist", "bridge")} {
		other.list.Bytes = []byte("second")
		if err := x.waits(now, other); err != nil {
			t.Errorf("another text in %s: %v", other.path, err)
		}
	}
}

// TestAlternatingTextsAreAConflict has two programs that write different texts without the entry.
func TestAlternatingTextsAreAConflict(t *testing.T) {
	var x conflict
	now := time.Now()
	for i := range maxAllAdditions + 1 {
		c := configOf("10-a.conflist", "bridge")
		c.list.Bytes = []byte{byte(i)}
		if isConflict := x.observe(now, c, plugin); isConflict != (i == maxAllAdditions) {
			t.Fatalf("addition %d: conflict is %v", i+1, isConflict)
		}
	}
	if err := x.waits(now, configOf("10-a.conflist", "bridge")); !errors.Is(err, ErrConflict) {
		t.Errorf("a further text: %v", err)
	}
}

func TestConflictWaitIsBounded(t *testing.T) {
	var x conflict
	for range 100 {
		x.observe(time.Now(), configOf("10-a.conflist"), plugin)
	}
	if x.backoff != maxBackoff {
		t.Errorf("the wait is %s, want %s", x.backoff, maxBackoff)
	}
}

func TestConflictNamesTheProgramAndItsSetting(t *testing.T) {
	for want, c := range map[string]*config{
		"cni.exclusive=false":         configOf("05-cilium.conflist", "cilium-cni", plugin),
		"the configuration of calico": configOf("10-calico.conflist", plugin, "calico"),
	} {
		if got := remedy(c, plugin); !strings.Contains(got, want) {
			t.Errorf("%q does not contain %q", got, want)
		}
	}
}

// TestRunLeavesAFileInConflictAlone has a program that writes its configuration without the entry
// whenever it has the entry, as Cilium does.
func TestRunLeavesAFileInConflictAlone(t *testing.T) {
	n := newNode(t, nil)
	const name = "05-cilium.conflist"
	results := n.start()
	text := chain("cilium", "cilium-cni")
	n.rename(name, text)
	isConflict := func(err error) bool {
		if errors.Is(err, ErrConflict) {
			return true
		}
		if n.isChained(name)(err) {
			n.rename(name, text)
		}
		return false
	}
	n.await(results, "a conflict", isConflict)
	for range 3 {
		n.rename(name, text)
		n.await(results, "still a conflict", func(err error) bool { return errors.Is(err, ErrConflict) })
		if got, err := os.ReadFile(n.path(name)); err != nil || string(got) != text {
			t.Errorf("during a conflict the file became\n%s%v", got, err)
		}
	}
	if n.Network() != "cilium" {
		t.Errorf("the network is %q", n.Network())
	}
}
