package agent

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
)

// TestRefusalIsLoggedOnce has a pod that cannot be adopted, for a reason that stays.
func TestRefusalIsLoggedOnce(t *testing.T) {
	b := newBed(t, "nftables")
	b.node.NodeIP = func(ipfamily.Family) (netip.Addr, error) { return netip.Addr{}, errors.New("no default route") }
	b.pod("c1", 7, "10.1.0.5")
	b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5")))
	b.round()
	if logged := b.Logged(); strings.Count(logged, "A pod was not adopted") != 1 {
		t.Errorf("the log is %s", logged)
	}
	b.idle("the second time")
	b.idle("the third time")
}
