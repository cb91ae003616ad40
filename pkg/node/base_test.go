package node

import (
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

func TestBase(t *testing.T) {
	const v4, v6 = "169.254.169.254:80", "[fd00:ec2::254]:80"
	const pod4, pod6 = "10.1.0.5", "fd00:1::5"
	broken := errors.New("broken")
	for name, tc := range map[string]struct {
		ips, redirected []string
		guard, forwards bool
		has             error
		want            []string
		warns           bool
	}{
		"IPv4":                             {ips: []string{pod4}, redirected: []string{v4}, guard: true, want: []string{v4}},
		"IPv4, IPv6 forwarded":             {ips: []string{pod4}, redirected: []string{v4}, guard: true, forwards: true, want: []string{v4, v6}},
		"IPv4, IPv6 forwarded, no guard":   {ips: []string{pod4}, redirected: []string{v4}, forwards: true, want: []string{v4}},
		"IPv4, IPv6 forwarded, no command": {ips: []string{pod4}, redirected: []string{v4}, guard: true, forwards: true, has: redirect.ErrNoIPTables, want: []string{v4}, warns: true},
		"IPv4, IPv6 forwarded, a broken command, which Open tells": {ips: []string{pod4}, redirected: []string{v4}, guard: true, forwards: true, has: broken, want: []string{v4, v6}},
		"both, the proxy of IPv4":                                  {ips: []string{pod4, pod6}, redirected: []string{v4}, guard: true, want: []string{v4, v6}},
		"both, the proxy of IPv4, no guard":                        {ips: []string{pod4, pod6}, redirected: []string{v4}, forwards: true, want: []string{v4}},
		"both, no command, which Open tells":                       {ips: []string{pod4, pod6}, redirected: []string{v4, v6}, guard: true, forwards: true, has: redirect.ErrNoIPTables, want: []string{v4, v6}},
		"IPv6":                                                     {ips: []string{pod6}, redirected: []string{v6}, guard: true, want: []string{v6}},
		"IPv6, IPv4 forwarded, as where a later plugin gives an address for the way out": {ips: []string{pod6}, redirected: []string{v6}, guard: true, forwards: true, want: []string{v6, v4}},
	} {
		t.Run(name, func(t *testing.T) {
			record := new(attachment.Record)
			for _, ip := range tc.ips {
				record.IPs = append(record.IPs, netip.MustParseAddr(ip))
			}
			for _, metadata := range tc.redirected {
				record.Redirects = append(record.Redirects, attachment.Redirect{Metadata: netip.MustParseAddrPort(metadata)})
			}
			var log strings.Builder
			n := New(Settings{MetadataIP: netip.MustParseAddr("169.254.169.254"), Guard: tc.guard},
				System{Forwards: func(hostlink.Family) bool { return tc.forwards }}, slog.New(slog.NewTextHandler(&log, nil)))
			base := n.base(func(netip.Addr) error { return tc.has }, record)
			var got []string
			for _, metadata := range base.Metadata {
				got = append(got, metadata.String())
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
			if base.Guard != tc.guard {
				t.Errorf("got guard %v", base.Guard)
			}
			if warned := strings.Contains(log.String(), "level=WARN"); warned != tc.warns {
				t.Errorf("logged %q", &log)
			}
		})
	}
}
