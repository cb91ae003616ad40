package agent

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// cached writes libcni's entry of a pod.
func (b *bed) cached(id, content string) {
	b.Helper()
	b.write(filepath.Join(b.Cache.Dir, "results", "net-"+id+"-eth0"), content)
}

// TestAdopt attaches a pod that came before the plugin as an ADD would have.
func TestAdopt(t *testing.T) {
	for name, netns := range map[string]func(*bed) string{
		"the cache names its namespace": func(b *bed) string { return cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5", "fd00:1::5")) },
		"it is searched": func(b *bed) string {
			b.Cache.NetnsDirs = []string{b.TempDir()}
			path := filepath.Join(b.Cache.NetnsDirs[0], "x")
			b.write(path, "")
			b.Pods[path] = b.Pods["/netns/c1"]
			return cacheEntryOf("c1", "", result("0.4.0", "10.1.0.5", "fd00:1::5"), without("netns"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			testhost.Backends(t, func(t *testing.T, backend string) {
				added := newBed(t, backend)
				added.round()
				want, err := added.node.Attach(t.Context(), added.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
				added.Must(err)
				rules := added.AllRules()

				b := newBed(t, backend)
				b.pod("c1", 7, "10.1.0.5", "fd00:1::5")
				b.round()
				b.idle("without an entry")
				b.cached("c1", netns(b))
				b.round()
				if diff := cmp.Diff(rules, b.AllRules()); diff != "" {
					t.Errorf("after the adoption:\n%s", diff)
				}
				got, err := b.node.Records.Get("c1", "eth0")
				b.Must(err)
				if name == "it is searched" {
					want.Netns = filepath.Join(b.Cache.NetnsDirs[0], "x")
				}
				if diff := cmp.Diff(want, got, addresses); diff != "" {
					t.Errorf("the record:\n%s", diff)
				}
				b.wantCut("after the adoption")
				if logged := b.Logged(); strings.Count(logged, "adopted a pod") != 1 || !strings.Contains(logged, "pod=c1") {
					t.Errorf("the log is %s", logged)
				}
				b.idle("after the adoption")
			})
		})
	}
}

// TestAdoptsWhoseRecordIsLost has the record of a live pod vanish or become garbage.
func TestAdoptsWhoseRecordIsLost(t *testing.T) {
	for name, lose := range map[string]func(*bed) error{
		"the record is gone": func(b *bed) error { return os.Remove(filepath.Join(b.node.StateDir, "attachments", "c1@eth0.json")) },
		"the record is garbage": func(b *bed) error {
			return os.Truncate(filepath.Join(b.node.StateDir, "attachments", "c1@eth0.json"), 10)
		},
		"the directory is gone":    func(b *bed) error { return os.RemoveAll(filepath.Join(b.node.StateDir, "attachments")) },
		"all of the state is gone": func(b *bed) error { return os.RemoveAll(b.node.StateDir) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, "nftables")
			b.attached(b.pod("c1", 7, "10.1.0.5"))
			b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5")))
			b.round()
			rules := b.AllRules()
			b.Must(lose(b))
			b.round()
			if diff := cmp.Diff(rules, b.AllRules()); diff != "" {
				t.Errorf("after the round:\n%s", diff)
			}
			holder, err := b.node.Records.Holder(netip.MustParseAddr("10.1.0.5"))
			if err != nil || holder.ID() != "c1@eth0" {
				t.Errorf("its address is held by %v, %v", holder, err)
			}
			b.idle("after the round")
		})
	}
}

// TestAdoptRefuses has cached attachments that cannot be adopted: each is logged once, and the
// others are adopted.
func TestAdoptRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		build   func(*bed)
		why     string
		records []string
	}{
		"an address that another holds": {
			func(b *bed) {
				b.attached(b.pod("c2", 8, "10.1.0.6"))
				b.pod("c1", 7, "10.1.0.6")
				b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.6")))
			}, "its address is held by c2@eth0", []string{"c2@eth0", "c9@eth0"},
		},
		"an interface that cannot be found": {
			func(b *bed) {
				b.pod("c1", 7, "10.1.0.5")
				b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5")))
				find := b.node.FindLink
				b.node.FindLink = func(netnsPath, ifName string) (*hostlink.Link, error) {
					if netnsPath == "/netns/c1" {
						return nil, errors.New("injected failure")
					}
					return find(netnsPath, ifName)
				}
			}, "injected failure", []string{"c9@eth0"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, "nftables")
			tc.build(b)
			b.pod("c9", 9, "10.1.0.9")
			b.cached("c9", cacheEntryOf("c9", "/netns/c9", resultBy("veth9", "1.1.0", "10.1.0.9")))
			b.round()
			if logged := b.Logged(); strings.Count(logged, "A pod was not adopted") != 1 || !strings.Contains(logged, "attachment=c1@eth0") || !strings.Contains(logged, tc.why) {
				t.Errorf("the log is %s", logged)
			}
			if diff := cmp.Diff(tc.records, b.Recorded()); diff != "" {
				t.Errorf("records:\n%s", diff)
			}
			b.idle("the second time")
			b.idle("the third time")
		})
	}
}

// TestAdoptRefusesUntilItCan has an obstacle that goes and comes back: the pod is adopted without
// it, and the refusal is logged again with it.
func TestAdoptRefusesUntilItCan(t *testing.T) {
	b := newBed(t, "nftables")
	b.attached(b.pod("c2", 8, "10.1.0.5"))
	b.pod("c1", 7, "10.1.0.5")
	b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5")))
	b.round()
	b.idle("while another holds its address")

	delete(b.links, 8)
	b.round()
	if diff := cmp.Diff([]string{"c1@eth0"}, b.Recorded()); diff != "" {
		t.Errorf("when the other is gone:\n%s", diff)
	}
	b.wantCut("after the adoption")
	b.idle("after the adoption")
}

// TestAdoptIgnoresOtherFiles has files in the cache that are no entry of a pod: garbage,
// half-written ones, those that vanish, and those of containers that are no pod.
func TestAdoptIgnoresOtherFiles(t *testing.T) {
	b := newBed(t, "nftables")
	b.pod("c1", 7, "10.1.0.5")
	whole := cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5"))
	b.cached("garbage", "\x00")
	b.cached("half", whole[:len(whole)/2])
	b.cached("gone", cacheEntryOf("gone", "/netns/gone", result("1.1.0", "10.1.0.8")))
	b.cached("container", cacheEntryOf("container", "/netns/c1", result("1.1.0", "10.1.0.5"), without("cniArgs")))
	b.cached("wrong", cacheEntryOf("wrong", "/netns/c1", result("9.0.0", "10.1.0.5")))
	b.round()
	if logged := b.Logged(); strings.Count(logged, "cached attachments that are not adopted") != 1 || !strings.Contains(logged, "net-wrong-eth0") {
		t.Errorf("the log is %s", logged)
	}
	b.idle("with nothing to adopt")
	if recorded := b.Recorded(); len(recorded) > 0 {
		t.Errorf("adopted %v", recorded)
	}
	b.cached("c1", whole)
	b.cached("twin", cacheEntryOf("twin", "/netns/c1", result("1.1.0", "10.1.0.5")))
	b.idle("with two that claim one namespace")
	b.Must(os.Remove(filepath.Join(b.Cache.Dir, "results", "net-twin-eth0")))
	b.round()
	if diff := cmp.Diff([]string{"c1@eth0"}, b.Recorded()); diff != "" {
		t.Errorf("when it is alone:\n%s", diff)
	}
}

// TestAdoptKeepsARecord has a cache entry that contradicts the record of an attached pod: the
// record stays.
func TestAdoptKeepsARecord(t *testing.T) {
	b := newBed(t, "nftables")
	b.attached(b.pod("c1", 7, "10.1.0.5"))
	b.round()
	b.Pods["/netns/c1"].IPs = append(b.Pods["/netns/c1"].IPs, netip.MustParseAddr("10.1.0.66"))
	b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5", "10.1.0.66")))
	b.idle("with a record")
	r, err := b.node.Records.Get("c1", "eth0")
	b.Must(err)
	data, err := json.Marshal(r.IPs)
	b.Must(err)
	if string(data) != `["10.1.0.5"]` || r.Datapath != attachment.DatapathRouted {
		t.Errorf("got %s, %s", data, r.Datapath)
	}
}
