package redirect_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

// FuzzRecordsYieldTheirOwnRulesOnly holds that a record that is believed, whatever its file has in it, becomes the rules of its own
// pod and nothing else, in each backend: one line and one element for each redirection, of its own addresses and under its own
// identity.
func FuzzRecordsYieldTheirOwnRulesOnly(f *testing.F) {
	for _, r := range recordsToFuzz() {
		data, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		for _, swap := range [][2]string{{`"source":"10.1.0.5"`, `"source":"10.9.9.9"`}, {"169.254:80", "169.254:443"}, {`"containerID":"c1"`, `"containerID":"c1@eth0"`}} {
			f.Add([]byte(strings.Replace(string(data), swap[0], swap[1], 1)))
		}
		for _, field := range []string{"c1", "eth0", "veth0", "br0", "net", "team", "169.254.169.254:80", "10.0.0.254:8181", "10.1.0.5"} {
			for _, attack := range []string{`\n-A KUBE2IAM-CNI -j ACCEPT`, ` -j ACCEPT`, `\"`, `+`, `,10.0.0.0/8`, `/0`, `\u0000`, `%eth0`} {
				f.Add([]byte(strings.ReplaceAll(string(data), `"`+field+`"`, `"`+field+attack+`"`)))
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := attachment.Decode(data)
		if err != nil {
			return
		}
		a := node.RulesOf(r)
		if len(a.Redirections) > len(r.IPs) {
			t.Errorf("%d redirections of %d addresses", len(a.Redirections), len(r.IPs))
		}
		for _, one := range a.Redirections {
			if !slices.Contains(r.IPs, one.Source) {
				t.Errorf("a redirection of %s, and the addresses are %v", one.Source, r.IPs)
			}
		}
		got, err := redirect.Elements(a)
		if err != nil {
			t.Fatalf("%+v is believed and cannot be programmed: %v", r, err)
		}
		if diff := cmp.Diff(elementsOf(r), got); diff != "" {
			t.Errorf("the elements of %+v:\n%s", r, diff)
		}
		if r.Datapath == attachment.DatapathPod {
			return
		}
		for _, v6 := range []bool{false, true} {
			got, err := redirect.Script(a, v6)
			if err != nil {
				t.Fatalf("%+v is believed and cannot be programmed: %v", r, err)
			}
			// Each line as iptables-restore parts it.
			var words [][]string
			for line := range strings.Lines(got) {
				words = append(words, strings.Fields(line))
			}
			if diff := cmp.Diff(linesOf(r, v6), words); diff != "" || strings.ContainsAny(got, "\"'\\\x00\r") {
				t.Errorf("the script of %+v is\n%q\n%s", r, got, diff)
			}
		}
	})
}

func recordsToFuzz() []*attachment.Record {
	pod := attachment.Pod{Namespace: "team", Name: "web-0", UID: "7d1c"}
	one := func(change func(*attachment.Record)) *attachment.Record {
		r := testrecord.New("c1", pod, netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd00:1::5"))
		change(r)
		return r
	}
	return []*attachment.Record{
		one(func(*attachment.Record) {}),
		one(func(r *attachment.Record) { r.Backend = "iptables-legacy" }),
		one(func(r *attachment.Record) { r.Datapath, r.HostLink.Bridge = attachment.DatapathBridged, "br0" }),
		one(func(r *attachment.Record) {
			r.Datapath, r.HostLink.Bridge, r.Backend, r.Mark = attachment.DatapathBridged, "br0", "iptables-nft", 0x1000
		}),
		one(func(r *attachment.Record) { r.Datapath, r.HostLink = attachment.DatapathPod, attachment.HostLink{} }),
		testrecord.New("c1", attachment.Pod{}, netip.MustParseAddr("10.1.0.5")),
	}
}

// linesOf is the whole script that a record may become.
func linesOf(r *attachment.Record, v6 bool) [][]string {
	var lines [][]string
	for _, one := range r.Redirects {
		if one.Source.Is6() != v6 {
			continue
		}
		enters := "-i " + r.HostLink.Name
		switch mask := fmt.Sprintf("/0x%x", r.Mark); {
		case r.Mark == 0xffffffff:
			enters = "-m mark --mark 0xffffffff"
		case r.Mark != 0:
			enters = fmt.Sprintf("-m mark --mark 0x%x%s", r.Mark, mask)
		case r.Datapath == attachment.DatapathBridged:
			enters = "-m physdev --physdev-in " + r.HostLink.Name
		}
		line := fmt.Sprintf("-A KUBE2IAM-CNI -s %s/%d %s -d %s/%d -p tcp -m tcp --dport 80 -m comment --comment %s@%s -j DNAT --to-destination %s",
			one.Source, one.Source.BitLen(), enters, one.Metadata.Addr(), one.Source.BitLen(), r.ContainerID, r.IfName, one.Proxy)
		lines = append(lines, strings.Split(line, " "))
	}
	if lines == nil {
		return nil
	}
	return slices.Concat([][]string{{"*nat"}}, lines, [][]string{{"COMMIT"}})
}

// elementsOf are all elements of nftables that a record may become.
func elementsOf(r *attachment.Record) []string {
	var bridge, own []string
	id, none := r.ContainerID+"@"+r.IfName, netip.AddrPort{}
	for _, one := range r.Redirects {
		family, heldSet := "ip", "held4"
		if one.Source.Is6() {
			family, heldSet = "ip6", "held6"
		}
		switch r.Datapath {
		case attachment.DatapathPod:
			own = append(own, redirect.Element(family, "own", "", one.Source, one.Proxy, id))
		case attachment.DatapathRouted:
			own = append(own, redirect.Element(family, "routed", r.HostLink.Name, one.Source, one.Proxy, id))
		default:
			bridge = append(bridge, redirect.Element("bridge", strings.Replace(heldSet, "held", "holders", 1), r.HostLink.Name, one.Source, none, id),
				redirect.Element("bridge", heldSet, "", one.Source, none, id))
			own = append(own, redirect.Element(family, "bridged", "", one.Source, one.Proxy, id))
		}
	}
	return append(bridge, own...)
}
