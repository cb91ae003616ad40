package agent

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/test/ruleset"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// macvlan gives the node a pod whose packets the host's rules do not see, with a namespace of its
// own.
func (b *bed) macvlan(id, ip string) (netnsPath string, rules func(nft ...string) string) {
	b.Helper()
	host, err := netns.Get()
	b.Must(err)
	pod, err := netns.New()
	b.Must(err)
	b.Must(netns.Set(host))
	b.Cleanup(func() { host.Close(); pod.Close() })
	netnsPath = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(pod))
	held := []netip.Addr{netip.MustParseAddr(ip)}
	b.Pods[netnsPath] = &hostlink.Link{IPs: held}
	find := b.node.FindLink
	b.node.FindLink = func(path, ifName string) (*hostlink.Link, error) {
		if path == netnsPath {
			return nil, &hostlink.UnsupportedError{IfName: ifName, Reason: "it is a macvlan", Kind: "macvlan", IPs: held}
		}
		return find(path, ifName)
	}
	b.cached(id, cacheEntryOf(id, netnsPath, resultBy("", "1.1.0", ip)))
	// rules runs nft in the pod, and returns what stands there of ours.
	return netnsPath, func(nft ...string) string {
		b.Helper()
		b.Must(netns.Set(pod))
		defer func() { b.Must(netns.Set(host)) }()
		for _, args := range nft {
			b.run("nft " + args)
		}
		lines, err := ruleset.Own()
		b.Must(err)
		return strings.Join(lines, "\n")
	}
}

// TestAdoptionIsCompletedInThePod has the redirection inside a pod fail when the pod is adopted:
// the next round makes it.
func TestAdoptionIsCompletedInThePod(t *testing.T) {
	b := newBed(t, "nftables")
	_, rules := b.macvlan("c1", "10.1.0.5")
	add := b.attachPod
	b.attachPod = func(context.Context, *attachment.Record) error { return os.ErrDeadlineExceeded }
	b.round()
	if logged := b.Logged(); !strings.Contains(logged, "A pod was not adopted") || !strings.Contains(logged, os.ErrDeadlineExceeded.Error()) {
		t.Errorf("the log is %s", logged)
	}
	if diff := cmp.Diff([]string{"c1@eth0"}, b.Recorded()); diff != "" {
		t.Errorf("records after a failure:\n%s", diff)
	}
	if !strings.Contains(b.AllRules(), "guard") {
		t.Errorf("without a guard:\n%s", b.AllRules())
	}
	b.attachPod = add
	b.round()
	if whole := rules(); !strings.Contains(whole, "c1@eth0") {
		t.Errorf("after the next round, in the pod there is\n%s", whole)
	}
	b.WantDestroyed("at the end")
	b.idle("at the end")
}

// TestGuardComesBeforeRedirectionsInPods has the rules of the host and of a pod be flushed: the pod
// does not decide how long the node is without a guard, or the agent not ready.
func TestGuardComesBeforeRedirectionsInPods(t *testing.T) {
	b := newBed(t, "nftables")
	_, rules := b.macvlan("c1", "10.1.0.5")
	b.round()
	b.round()
	guarded, whole := b.AllRules(), rules()
	b.run("nft flush ruleset")
	rules("flush ruleset")
	repaired, added := 0, 0
	b.OnRepaired = func(err error) { b.Must(err); repaired++ }
	add := b.attachPod
	b.attachPod = func(ctx context.Context, r *attachment.Record) error {
		added++
		if diff := cmp.Diff(guarded, b.AllRules()); diff != "" || repaired != 1 {
			t.Errorf("when the pod is entered, the agent has called Repaired %d times; the node's rules (-want +got):\n%s", repaired, diff)
		}
		return add(ctx, r)
	}
	b.round()
	if diff := cmp.Diff(whole, rules()); diff != "" || added != 1 {
		t.Errorf("after %d redirections in the pod:\n%s", added, diff)
	}
}

// TestRoundInPods follows a redirection inside a pod: it is adopted, made again and collected as
// the host's are.
func TestRoundInPods(t *testing.T) {
	testhost.Backends(t, func(t *testing.T, backend string) {
		b := newBed(t, backend)
		b.attached(b.pod("c9", 9, "10.1.0.9"))
		b.round()
		onHost := b.AllRules()
		netnsPath, rules := b.macvlan("c1", "10.1.0.5")
		b.cut()
		b.round()
		b.wantCut("after the adoption")
		whole := rules()
		if !strings.Contains(whole, `10.1.0.5 comment "c1@eth0" : 192.168.7.2 . 8181`) {
			t.Errorf("in the pod there is\n%s", whole)
		}
		if r, err := b.node.Records.Get("c1", "eth0"); err != nil || r.Datapath != attachment.DatapathPod {
			t.Errorf("got the record %v, %v", r, err)
		}
		b.idle("after the adoption")

		for _, damage := range []string{"flush ruleset", "flush map ip kube2iam-cni pod", "flush chain ip kube2iam-cni redirections", "delete table ip kube2iam-cni"} {
			if rules(damage) == whole {
				t.Fatalf("%s: no damage", damage)
			}
			b.round()
			if diff := cmp.Diff(whole, rules()); diff != "" {
				t.Errorf("%s: after the round:\n%s", damage, diff)
			}
			if logged := b.Logged(); strings.Count(logged, "repairing a redirection inside a pod") != 1 {
				t.Errorf("%s: logged %s", damage, logged)
			}
			if cuts := b.cut(); len(cuts) > 0 {
				t.Errorf("%s: cut the host's connections to %v", damage, cuts)
			}
			b.idle("after " + damage)
		}

		b.Pods[netnsPath] = nil // its interface has another address, or is gone
		b.round()
		if after := rules(); strings.Contains(after, "c1@eth0") {
			t.Errorf("after the collection:\n%s", after)
		}
		if diff := cmp.Diff([]string{"c9@eth0"}, b.Recorded()); diff != "" {
			t.Errorf("after the collection:\n%s", diff)
		}
		if diff := cmp.Diff(onHost, b.AllRules()); diff != "" {
			t.Errorf("on the host, at the end:\n%s", diff)
		}
		b.idle("after the collection")
	})
}
