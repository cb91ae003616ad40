package netns

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
)

// TestDelLeavesNothing: after DEL rules and records are as before ADD.
func TestDelLeavesNothing(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		stays := n.run("stays", "app")
		rules, records := n.rules(), n.records()
		goes := n.run("goes", "other")
		if n.rules() == rules || cmp.Equal(records, n.records()) {
			t.Errorf("ADD made no rule or no record:\n%s\n%v", n.rules(), n.records())
		}
		n.must(n.Check(t.Context(), goes))
		n.must(n.StopPod(t.Context(), goes))
		if diff := cmp.Diff(rules, n.rules()); diff != "" {
			t.Errorf("rules before ADD and after DEL (-before +after):\n%s", diff)
		}
		if diff := cmp.Diff(records, n.records()); diff != "" {
			t.Errorf("records before ADD and after DEL (-before +after):\n%s", diff)
		}
		n.must(n.StopPod(t.Context(), stays))
		n.wantNoTrace(stays)
		if records := n.records(); len(records) != 0 {
			t.Errorf("records after the last DEL: %v", records)
		}
	})
}

// TestDelAlwaysSucceeds: DEL succeeds a second time, without a namespace, and for an unknown
// container.
func TestDelAlwaysSucceeds(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		ctx := t.Context()
		neighbour := n.run("neighbour", "app")
		rules, records := n.rules(), n.records()
		unchanged := func(after string) {
			t.Helper()
			if diff := cmp.Diff(rules, n.rules()); diff != "" {
				t.Errorf("rules after %s (-want +got):\n%s", after, diff)
			}
			if diff := cmp.Diff(records, n.records()); diff != "" {
				t.Errorf("records after %s (-want +got):\n%s", after, diff)
			}
		}

		twice := n.run("twice", "app")
		n.must(n.Del(ctx, twice.Runtime()))
		unchanged("DEL")
		n.must(n.Del(ctx, twice.Runtime()))
		unchanged("a second DEL")

		empty := n.run("empty", "app")
		rt := empty.Runtime()
		rt.NetNS = ""
		n.must(n.Del(ctx, rt))
		unchanged("DEL with an empty CNI_NETNS")

		gone := n.run("gone", "app")
		rt = gone.Runtime()
		n.must(gone.Netns.Close())
		if _, err := os.Stat(rt.NetNS); !os.IsNotExist(err) {
			t.Fatalf("%s: %v, want it gone", rt.NetNS, err)
		}
		n.must(n.Del(ctx, rt))
		unchanged("DEL with a netns that is gone")

		never, err := n.NewSandbox("default", "never", "")
		n.must(err)
		n.must(n.Del(ctx, never.Runtime()))
		unchanged("DEL of a container never seen")

		n.must(n.Check(ctx, neighbour))
		n.must(n.Del(ctx, neighbour.Runtime()))
		n.wantNoTrace(neighbour)
	})
}

// TestSecondAdd: a second ADD of one attachment replaces what the first made.
func TestSecondAdd(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy()
		ctx := t.Context()
		pod := n.run("twice", "app")
		rules, records := n.rules(), n.records()
		n.must(n.AddAgain(ctx, pod, pod.Result))
		if diff := cmp.Diff(rules, n.rules()); diff != "" {
			t.Errorf("rules after the same ADD (-before +after):\n%s", diff)
		}
		if diff := cmp.Diff(records, n.records()); diff != "" {
			t.Errorf("records after the same ADD (-before +after):\n%s", diff)
		}
		n.wantOwn(pod, "app")

		// With another IP the first one's rule and its holder go.
		other := netip.MustParseAddr("10.201.0.77")
		for _, change := range []string{"del " + pod.Result.IPs[0].Address.String(), "add " + other.String() + "/24"} {
			_, err := pod.Netns.Run(ctx, n.ClientEnv(), "ip", append(strings.Fields("address "+change), "dev", "eth0")...)
			n.must(err)
		}
		result := &types100.Result{CNIVersion: pod.Result.CNIVersion, Interfaces: pod.Result.Interfaces}
		ip := *pod.Result.IPs[0]
		ip.Address.IP = other.AsSlice()
		result.IPs = []*types100.IPConfig{&ip}
		n.must(n.AddAgain(ctx, pod, result))
		want := rules
		for _, after := range []string{"/", " "} { // iptables' way to write an address, and nft's
			want = strings.ReplaceAll(want, pod.IP.String()+after, other.String()+after)
		}
		if diff := cmp.Diff(want, n.rules()); diff != "" {
			t.Errorf("rules after an ADD with another IP (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff([]string{pod.ContainerID + "@eth0", other.String()}, n.records()); diff != "" {
			t.Errorf("records after an ADD with another IP (-want +got):\n%s", diff)
		}
		n.must(n.Del(ctx, pod.Runtime()))
		n.wantNoTrace(pod)
		if records := n.records(); len(records) != 0 {
			t.Errorf("records after DEL: %v", records)
		}
	})
}

// TestCheckAndGC: CHECK reports a missing rule, and GC removes an attachment that no longer
// exists.
func TestCheckAndGC(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		ctx := t.Context()
		n.must(n.Status(ctx))
		valid, stale := n.run("valid", "app"), n.run("stale", "app")
		n.must(n.GC(ctx, valid))
		n.wantNoTrace(stale)
		n.must(n.Check(ctx, valid))
		n.flush()
		if err := n.Check(ctx, valid); err == nil || !strings.Contains(err.Error(), valid.IP.String()) {
			t.Errorf("CHECK with the redirections flushed: %v, want an error that names %s", err, valid.IP)
		}
	})
}
