package imds

import (
	"net/netip"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

func TestRedirectedByTheSourcesRecord(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	meta, proxy := netip.MustParseAddrPort("169.254.170.2:80"), netip.MustParseAddrPort("10.0.0.254:8181")
	for name, tt := range map[string]struct {
		path        attachment.Datapath
		source      netip.Addr
		destination netip.AddrPort
		want        bool
	}{
		"its metadata":                  {attachment.DatapathRouted, a, meta, true},
		"another's":                     {attachment.DatapathRouted, b, meta, false},
		"the proxy itself, from a pod":  {attachment.DatapathPod, a, proxy, true},
		"the proxy itself, from a node": {attachment.DatapathRouted, a, proxy, false},
	} {
		t.Run(name, func(t *testing.T) {
			record := testrecord.New("c", attachment.Pod{Namespace: "ns", Name: "pod", UID: "uid"}, a, b)
			record.Datapath = tt.path
			record.Redirects = []attachment.Redirect{{Source: tt.source, Metadata: meta, Proxy: proxy}}
			dir := attachment.In(t.TempDir())
			if err := dir.Put(record); err != nil {
				t.Fatal(err)
			}
			if got := Redirected(attachment.NewIndex(dir), netip.Addr{})(a, tt.destination); got != tt.want {
				t.Errorf("%v", got)
			}
		})
	}
}
