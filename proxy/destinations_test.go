package main

import (
	"net/netip"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

func TestDestinationsAreThoseOfTheSourcesOwnRedirect(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	meta, proxy := netip.MustParseAddrPort("169.254.170.2:80"), netip.MustParseAddrPort("10.0.0.254:8181")
	for name, tt := range map[string]struct {
		path        attachment.Path
		source      netip.Addr
		metadata    netip.AddrPort
		destination netip.AddrPort
		want        bool
	}{
		"its metadata":                  {attachment.PathRouted, a, meta, meta, true},
		"another's":                     {attachment.PathRouted, b, meta, meta, false},
		"the proxy itself, from a pod":  {attachment.PathNetns, a, meta, proxy, true},
		"the proxy itself, from a node": {attachment.PathRouted, a, meta, proxy, false},
		"redirected to where it goes":   {attachment.PathRouted, a, proxy, proxy, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := attachment.In(t.TempDir())
			if err := dir.Put(t.Context(), &attachment.Record{ContainerID: "c", IfName: "eth0", Network: "net", IPs: []netip.Addr{a}, Path: tt.path,
				Pod: attachment.Pod{Namespace: "ns", Name: "pod", UID: "uid"}, Redirects: []attachment.Redirect{{Source: tt.source, Metadata: tt.metadata, Proxy: proxy}}}); err != nil {
				t.Fatal(err)
			}
			if got := destinations(attachment.NewIndex(dir), netip.Addr{})(a, tt.destination); got != tt.want {
				t.Errorf("%v", got)
			}
		})
	}
}
