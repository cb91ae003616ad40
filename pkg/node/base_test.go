package node

import (
	"log/slog"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
)

// TestBase holds what the rules of some pods rely on, and that all families of the kernel are guarded whichever the pods are of.
func TestBase(t *testing.T) {
	const v4, v6 = "169.254.169.254:80", "[fd00:ec2::254]:80"
	const pod4, pod6 = "10.1.0.5", "fd00:1::5"
	for name, tc := range map[string]struct {
		ips, redirected  []string
		unguarded        bool
		path             attachment.Datapath
		ipv4Only         bool
		metadata, guards []string
	}{
		"no pods":                           {guards: []string{v4, v6}},
		"no pods, a kernel without IPv6":    {ipv4Only: true, guards: []string{v4}},
		"no pods, no guard":                 {unguarded: true},
		"IPv4":                              {ips: []string{pod4}, redirected: []string{v4}, metadata: []string{v4}, guards: []string{v4, v6}},
		"IPv4, no guard":                    {ips: []string{pod4}, redirected: []string{v4}, unguarded: true, metadata: []string{v4}},
		"IPv6":                              {ips: []string{pod6}, redirected: []string{v6}, metadata: []string{v6}, guards: []string{v4, v6}},
		"both":                              {ips: []string{pod4, pod6}, redirected: []string{v4, v6}, metadata: []string{v4, v6}, guards: []string{v4, v6}},
		"both, the proxy of IPv4":           {ips: []string{pod4, pod6}, redirected: []string{v4}, metadata: []string{v4, v6}, guards: []string{v4, v6}},
		"both, the proxy of IPv4, no guard": {ips: []string{pod4, pod6}, redirected: []string{v4}, unguarded: true, metadata: []string{v4}},
		"inside the pod":                    {ips: []string{pod4}, redirected: []string{v4}, path: attachment.DatapathPod, metadata: []string{v4}, guards: []string{v4, v6}},
		"inside the pod, no guard":          {ips: []string{pod4}, redirected: []string{v4}, path: attachment.DatapathPod, unguarded: true},
	} {
		t.Run(name, func(t *testing.T) {
			record := &attachment.Record{Datapath: tc.path}
			for _, ip := range tc.ips {
				record.IPs = append(record.IPs, netip.MustParseAddr(ip))
			}
			for _, metadata := range tc.redirected {
				record.Redirects = append(record.Redirects, attachment.Redirect{Metadata: netip.MustParseAddrPort(metadata)})
			}
			n := New(Settings{MetadataIP: netip.MustParseAddr("169.254.169.254"), Guard: !tc.unguarded},
				System{Has: func(f hostlink.Family) bool { return f == hostlink.IPv4 || !tc.ipv4Only }}, slog.New(slog.DiscardHandler))
			base := n.base(record)
			if diff := cmp.Diff(tc.metadata, texts(base.Metadata)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(tc.guards, texts(base.Guarded)); diff != "" {
				t.Errorf("guarded: %s", diff)
			}
			if base.Guard == tc.unguarded {
				t.Errorf("got guard %v", base.Guard)
			}
		})
	}
}

func texts(services []netip.AddrPort) []string {
	var all []string
	for _, s := range services {
		all = append(all, s.String())
	}
	return all
}
