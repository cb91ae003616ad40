package netns

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// endWithoutDEL ends a pod without a DEL: its network namespace ends, and with it the veth.
func (n *node) endWithoutDEL(s *testbed.Sandbox) {
	n.t.Helper()
	link := n.record(s, "eth0").HostLink.Name
	n.must(s.Netns.Close())
	n.eventually(func() bool {
		gone := false
		n.must(n.Node.Do(func() error {
			_, err := netlink.LinkByName(link)
			gone = err != nil
			return nil
		}))
		return gone
	})
}

// TestPodWithoutDEL: a round removes what a pod without a DEL left, and the next holder of its
// address never gets its role.
func TestPodWithoutDEL(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		stays, goes := n.run("stays", "app"), n.run("goes", "other")
		n.endWithoutDEL(goes)
		if log := n.round(); !strings.Contains(log, "collecting an attachment that is gone") {
			t.Errorf("the agent said %q", log)
		}
		n.wantNoTrace(goes)
		n.wantIdle()
		n.wantOwn(stays, "app")
		n.must(n.Del(t.Context(), goes.Runtime()))
	})
}

// TestReusedAddressAndVeth is a runtime that gives an address and a veth's name to the next pod,
// and never sent the DEL of the one before; the agent comes before the heir, after it, or not at
// all, and the late DEL after that.
func TestReusedAddressAndVeth(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		for i, when := range []string{"before", "after", "never"} {
			former := n.run(fmt.Sprintf("former%d", i), "other")
			n.wantOwn(former, "other")
			veth := n.record(former, "eth0").HostLink.Name
			n.endWithoutDEL(former)
			n.must(n.KubeAPI.DeletePod("default", former.Name))
			n.must(os.Remove(filepath.Join(n.Dir, "ipam", testbed.Network, former.IP.String())))
			if when == "before" {
				n.round()
			}
			heir := n.heir(fmt.Sprintf("heir%d", i), "app", former, veth)
			if got := n.record(heir, "eth0"); got.HostLink.Name != veth || heir.IP != former.IP {
				t.Fatalf("the heir has %s at %s, not its predecessor's", heir.IP, got.HostLink.Name)
			}
			n.wantOwn(heir, "app")
			if when == "after" {
				n.round()
				n.wantOwn(heir, "app")
			}
			rules, records := n.rules(), n.records()
			n.must(n.delOurs(former))
			if diff := cmp.Diff(rules, n.rules()); diff != "" {
				t.Errorf("%s: the late DEL changed rules (-before +after):\n%s", when, diff)
			}
			if diff := cmp.Diff(records, n.records()); diff != "" {
				t.Errorf("%s: the late DEL changed records (-before +after):\n%s", when, diff)
			}
			n.wantOwn(heir, "app")
			n.must(n.StopPod(t.Context(), heir))
			n.wantNoTrace(heir)
		}
	})
}

// heir is a pod that gets the address of a former one, and a veth of the same name.
func (n *node) heir(name, role string, former *testbed.Sandbox, veth string) *testbed.Sandbox {
	n.t.Helper()
	chain := n.SetChain()
	s := n.pending(name, role)
	s.IP = former.IP
	n.must(n.Add(n.t.Context(), s))
	n.must(n.Node.Do(func() error {
		for _, i := range s.Result.Interfaces {
			if link, err := netlink.LinkByName(i.Name); err == nil && i.Sandbox == "" && link.Type() == "veth" {
				if err := netlink.LinkSetDown(link); err != nil {
					return err
				}
				if err := netlink.LinkSetName(link, veth); err != nil {
					return err
				}
				if err := netlink.LinkSetUp(link); err != nil {
					return err
				}
				i.Name = veth
				return n.routeTo(link, s)
			}
		}
		return fmt.Errorf("no veth in %+v", s.Result)
	}))
	n.SetChain(chain...)
	n.must(n.AddAgain(n.t.Context(), s, s.Result))
	n.must(n.KubeAPI.SetStatus("default", name, "Running", s.IP.String()))
	return s
}

// routeTo makes the route again that went when the veth was down.
func (n *node) routeTo(link netlink.Link, s *testbed.Sandbox) error {
	if n.primary == "bridge" {
		return nil
	}
	return netlink.RouteReplace(&netlink.Route{
		LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: s.IP.AsSlice(), Mask: net.CIDRMask(32, 32)},
	})
}

// delOurs is the DEL of our plugin alone: the primary plugin's would take away what is its
// successor's by now.
func (n *node) delOurs(s *testbed.Sandbox) error {
	return n.CallOurs(n.t.Context(), "DEL", s, nil)
}
