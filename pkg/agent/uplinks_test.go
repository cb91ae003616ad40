package agent

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/uplink"
)

func TestRoundGuardsUplinks(t *testing.T) {
	b := newBed(t, "nftables")
	b.uplinks.attached = []string{"eth0"}
	b.round()
	if output := b.Logged(); !strings.Contains(output, "guarded uplinks") || !strings.Contains(output, "eth0") {
		t.Errorf("the log is\n%s", output)
	}
}

// TestUnguardedUplinkIsAnError has an uplink that cannot be guarded. The rest of the round is made.
func TestUnguardedUplinkIsAnError(t *testing.T) {
	b := newBed(t, "nftables")
	b.uplinks.err = errors.New("uplink eth0: device or resource busy")
	var repaired error
	b.OnRepaired = func(err error) { repaired = err }
	if err := b.Round(t.Context()); !errors.Is(err, b.uplinks.err) || !errors.Is(repaired, b.uplinks.err) {
		t.Errorf("the round returned %v and reported %v, want %v", err, repaired, b.uplinks.err)
	}
	if rules := b.AllRules(); !strings.Contains(rules, "fd00:ec2::254") {
		t.Errorf("the guard in netfilter is missing:\n%s", rules)
	}
}

func TestKernelWithoutUplinkGuardIsLoggedOnce(t *testing.T) {
	b := newBed(t, "nftables")
	b.uplinks.unsupported = uplink.ErrUnsupported
	for range 3 {
		b.round()
	}
	if output := b.Logged(); strings.Count(output, "The uplinks are not guarded") != 1 {
		t.Errorf("the log is\n%s", output)
	}
}

// TestUplinkThatCannotBeGuardedIsLogged has a kernel that loads the program and attaches it nowhere.
func TestUplinkThatCannotBeGuardedIsLogged(t *testing.T) {
	b := newBed(t, "nftables")
	b.uplinks.err = fmt.Errorf("uplink eth0: %w", uplink.ErrUnsupported)
	b.round()
	if output := b.Logged(); !strings.Contains(output, "The uplinks are not guarded") {
		t.Errorf("the log is\n%s", output)
	}
}

// TestUplinksAreNotGuardedWithoutAGuard removes what an earlier agent attached, once.
func TestUplinksAreNotGuardedWithoutAGuard(t *testing.T) {
	b := newBed(t, "nftables")
	b.node.Guard = false
	b.uplinks.attached = []string{"eth0"}
	for range 2 {
		if err := b.guardUplinks(); err != nil || b.Agent.uplinks != nil || b.uplinks.removals != 1 {
			t.Errorf("%v, %v, removed %d times", b.Agent.uplinks, err, b.uplinks.removals)
		}
	}
}
