package rules

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

// FuzzRecordsYieldTheirOwnRulesOnly holds that a record that is accepted, whatever its file
// contains, becomes the rules of its own pod and no others, with each backend and each datapath.
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
		if len(r.Redirects) > len(r.IPs) {
			t.Errorf("%d redirections of %d addresses", len(r.Redirects), len(r.IPs))
		}
		elements := elementsOf(r)
		if r.Datapath == attachment.DatapathPod {
			elements = podRedirection(r).Elements
		}
		var got []string
		for _, e := range elements {
			if e.Owner != NodeOwner {
				got = append(got, fmt.Sprintf("%s %x %x %s", e.Set.Name, e.Key, e.Value, e.Owner))
			}
		}
		if diff := cmp.Diff(wantElements(r), got); diff != "" {
			t.Errorf("the elements of %+v (-want +got):\n%s", r, diff)
		}
		if r.Datapath == attachment.DatapathPod {
			return
		}
		for _, family := range []*family{ipv4, ipv6} {
			var got [][]string
			for _, rule := range redirectRules(family, []*attachment.Record{r}) {
				got = append(got, rule.spec)
			}
			if diff := cmp.Diff(wantRules(r, family), got); diff != "" {
				t.Errorf("the iptables rules of %+v (-want +got):\n%s", r, diff)
			}
		}
	})
}

func recordsToFuzz() []*attachment.Record {
	pod := attachment.Pod{Namespace: "team", Name: "web-0", UID: "7d1c"}
	changed := func(change func(*attachment.Record)) *attachment.Record {
		r := testrecord.New("c1", pod, netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd00:1::5"))
		change(r)
		return r
	}
	return []*attachment.Record{
		changed(func(*attachment.Record) {}),
		changed(func(r *attachment.Record) { r.Backend = attachment.BackendIPTables }),
		changed(func(r *attachment.Record) { r.Datapath, r.HostLink.Bridge = attachment.DatapathBridged, "br0" }),
		changed(func(r *attachment.Record) {
			r.Datapath, r.HostLink.Bridge, r.Backend = attachment.DatapathBridged, "br0", attachment.BackendIPTables
		}),
		changed(func(r *attachment.Record) { r.Datapath, r.HostLink = attachment.DatapathPod, attachment.HostLink{} }),
		testrecord.New("c1", attachment.Pod{}, netip.MustParseAddr("10.1.0.5")),
	}
}

// wantElements returns all elements that a record may become.
func wantElements(r *attachment.Record) []string {
	var redirects, bindings []string
	id := r.ContainerID + "@" + r.IfName
	element := func(set, link string, ip netip.Addr, proxy netip.AddrPort) string {
		var key, value []byte
		if link != "" {
			key = make([]byte, 16)
			copy(key, link)
		}
		if proxy.IsValid() {
			value = append(proxy.Addr().AsSlice(), byte(proxy.Port()>>8), byte(proxy.Port()), 0, 0)
		}
		return fmt.Sprintf("%s %x %x %s", set, append(key, ip.AsSlice()...), value, id)
	}
	for _, redirect := range r.Redirects {
		suffix := "4"
		if redirect.Source.Is6() {
			suffix = "6"
		}
		switch r.Datapath {
		case attachment.DatapathPod:
			redirects = append(redirects, element("pod", "", redirect.Source, redirect.Proxy))
		case attachment.DatapathRouted:
			redirects = append(redirects, element("routed", r.HostLink.Name, redirect.Source, redirect.Proxy))
		default:
			redirects = append(redirects, element("bridged", "", redirect.Source, redirect.Proxy))
			bindings = append(bindings, element("ports"+suffix, r.HostLink.Name, redirect.Source, netip.AddrPort{}),
				element("bound"+suffix, "", redirect.Source, netip.AddrPort{}))
		}
	}
	return slices.Concat(redirects, bindings)
}

// wantRules returns the arguments of all iptables rules that a record may become.
func wantRules(r *attachment.Record, f *family) [][]string {
	var rules [][]string
	for _, redirect := range r.Redirects {
		if familyOf(redirect.Source) != f {
			continue
		}
		link := "-i " + r.HostLink.Name
		if r.Datapath == attachment.DatapathBridged {
			link = "-m physdev --physdev-in " + r.HostLink.Name
		}
		bits := redirect.Source.BitLen()
		rules = append(rules, strings.Split(fmt.Sprintf("-s %s/%d %s -d %s/%d -p tcp -m tcp --dport 80 -m comment --comment %s@%s -j DNAT --to-destination %s",
			redirect.Source, bits, link, redirect.Metadata.Addr(), bits, r.ContainerID, r.IfName, redirect.Proxy), " "))
	}
	return rules
}
