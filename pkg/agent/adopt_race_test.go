package agent

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// beforeLock calls do once, after the agent has found a pod's interface and before it has the lock.
func (b *bed) beforeLock(do func()) {
	find := b.node.FindLink
	b.node.FindLink = func(netnsPath, ifName string) (*hostlink.Link, error) {
		link, err := find(netnsPath, ifName)
		if do != nil {
			once := do
			do = nil
			once()
		}
		return link, err
	}
}

// TestAdoptionYieldsToAConcurrentChange has a change between the agent's snapshot and its lock: the
// other attachment keeps its record and rules.
func TestAdoptionYieldsToAConcurrentChange(t *testing.T) {
	for name, tc := range map[string]struct {
		do      func(*bed)
		records []string
		logged  string
	}{
		"nothing": {func(*bed) {}, []string{"c1@eth0"}, "adopted a pod"},
		"its address is another's, by an ADD": {func(b *bed) {
			delete(b.links, 7)
			b.attached(b.pod("c2", 8, "10.1.0.5"))
		}, []string{"c2@eth0"}, "its address is held by c2@eth0"},
		"its own ADD comes": {func(b *bed) {
			b.attached(attach.Request{ContainerID: "c1", IfName: "eth0", Netns: "/netns/c1", Network: "net", IPs: []netip.Addr{netip.MustParseAddr("10.1.0.5")}})
		}, []string{"c1@eth0"}, "it was attached in the meantime"},
		"it ends": {func(b *bed) { delete(b.links, 7) }, nil, "its interface eth0 is gone"},
	} {
		t.Run(name, func(t *testing.T) {
			testhost.Backends(t, func(t *testing.T, backend string) {
				b := newBed(t, backend)
				b.pod("c1", 7, "10.1.0.5")
				b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5")))
				after := ""
				b.beforeLock(func() { tc.do(b); after = b.AllRules() })
				b.round()
				if diff := cmp.Diff(tc.records, b.Recorded()); diff != "" {
					t.Error(diff)
				}
				if logged := b.Logged(); !strings.Contains(logged, tc.logged) {
					t.Errorf("the log is %s", logged)
				}
				if name != "nothing" && b.AllRules() != after {
					t.Errorf("the rules:\n%s", cmp.Diff(after, b.AllRules()))
				}
			})
		})
	}
}

// TestAdoptionNeedsAChainedNetwork has pods of a network that the plugin is not chained in: a
// warning is logged once, and they are adopted when the plugin is chained.
func TestAdoptionNeedsAChainedNetwork(t *testing.T) {
	b := newBed(t, "nftables")
	b.chained = nil
	b.pod("c1", 7, "10.1.0.5")
	b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5")))
	b.round()
	if logged := b.Logged(); strings.Count(logged, "is not chained in it") != 1 || !strings.Contains(logged, `network \"net\"`) {
		t.Errorf("the log is %s", logged)
	}
	b.idle("while it is not chained")

	b.chained = []string{"other", "net"}
	b.round()
	if diff := cmp.Diff([]string{"c1@eth0"}, b.Recorded()); diff != "" {
		t.Errorf("when it is chained: %s", diff)
	}

	// A configuration that is away for a while takes nothing from a network that pods are attached of.
	b.chained = nil
	b.pod("c2", 8, "10.1.0.6")
	b.cached("c2", cacheEntryOf("c2", "/netns/c2", resultBy("veth8", "1.1.0", "10.1.0.6")))
	b.round()
	if diff := cmp.Diff([]string{"c1@eth0", "c2@eth0"}, b.Recorded()); diff != "" {
		t.Errorf("by the records: %s", diff)
	}

	// Nor from one whose pods the runtime attached with the plugin in the chain.
	b = newBed(t, "nftables")
	b.chained = nil
	b.Cache.HasPlugin = func(config []byte) bool { return strings.Contains(string(config), "kube2iam-cni") }
	b.pod("c1", 7, "10.1.0.5")
	b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5"), with("config", []byte(`{"plugins":[{"type":"kube2iam-cni"}]}`))))
	b.round()
	if diff := cmp.Diff([]string{"c1@eth0"}, b.Recorded()); diff != "" {
		t.Errorf("by its entry: %s", diff)
	}
}

// TestNamespacesEnteredByARound counts the network namespaces that a round enters for pods of the
// cache: none for those that are on record, and each once for those that are not, also where the
// entries do not say whose is whose.
func TestNamespacesEnteredByARound(t *testing.T) {
	for _, named := range []bool{true, false} {
		t.Run(fmt.Sprintf("named %v", named), func(t *testing.T) {
			for _, pods := range []int{5, 50} {
				b := newBed(t, "nftables")
				b.Cache.NetnsDirs = []string{t.TempDir()}
				for i := range pods {
					id, ip := fmt.Sprintf("c%d", i), fmt.Sprintf("10.1.0.%d", 10+i)
					b.pod(id, 100+i, ip)
					path := b.Cache.NetnsDirs[0] + "/" + id
					b.write(path, "")
					b.Pods[path] = b.Pods["/netns/"+id]
					if b.Pods[path].Name = hostLink; named {
						b.cached(id, cacheEntryOf(id, path, result("1.1.0", ip)))
					} else {
						b.cached(id, cacheEntryOf(id, "", result("1.1.0", ip), without("netns")))
					}
					b.links[100+i] = hostLink
				}
				b.lookups = 0
				b.round()
				if len(b.Recorded()) != pods || b.lookups != pods {
					t.Errorf("looked %d times to adopt %d of %d", b.lookups, len(b.Recorded()), pods)
				}
				b.lookups = 0
				b.round()
				if b.lookups > 0 {
					t.Errorf("looked %d times when all were adopted", b.lookups)
				}
			}
		})
	}
}
