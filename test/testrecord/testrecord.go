// Package testrecord makes attachment records for tests.
package testrecord

import (
	"net/netip"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// New returns a record as the plugin writes it for a routed pod. Its redirections lead to port 8181
// of 10.0.0.254 and fd00::fe.
func New(containerID string, pod attachment.Pod, ips ...netip.Addr) *attachment.Record {
	r := &attachment.Record{
		ContainerID: containerID, IfName: "eth0", Network: "net", Netns: "/run/netns/" + containerID, Pod: pod, IPs: ips,
		HostLink: attachment.HostLink{Name: "veth0", Index: 7}, Datapath: attachment.DatapathRouted, Backend: "nftables",
		Created: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC),
	}
	for _, ip := range ips {
		one := attachment.Redirect{Source: ip, Metadata: netip.MustParseAddrPort("169.254.169.254:80"), Proxy: netip.MustParseAddrPort("10.0.0.254:8181")}
		if ip.Is6() {
			one.Metadata, one.Proxy = netip.MustParseAddrPort("[fd00:ec2::254]:80"), netip.MustParseAddrPort("[fd00::fe]:8181")
		}
		r.Redirects = append(r.Redirects, one)
	}
	return r
}
