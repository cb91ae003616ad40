package netns

import (
	"net/http"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
)

// TestClients has the clients find the pod's credentials by both versions of the protocol, again
// and again, and across a restart of the proxy.
func TestClients(t *testing.T) {
	onClients(t, func(t *testing.T, n *node, c client) {
		proxy := n.proxy(impatient...)
		pod := n.run("pod", "app")
		n.countTokens(pod)
		p := n.starts(pod, c)
		p.wantOwn("app")
		if n.tokensSent(pod) == 0 {
			t.Error("no request had a token")
		}
		p.again()
		p.wantOwn("app")
		n.must(proxy.Stop())
		n.proxy(impatient...)
		p.again()
		p.wantOwn("app")

		old := n.run("old", "other")
		n.countTokens(old)
		n.forceV1(old)
		p = n.starts(old, c)
		p.wantOwn("other")
		if sent := n.tokensSent(old); sent > 0 {
			t.Errorf("%d requests had a token", sent)
		}
	})
}

// TestClientsAreTold is what a client's user sees where there is nothing to get, with the reason
// where the client shows one. It asks once or twice, and does not go on trying.
func TestClientsAreTold(t *testing.T) {
	onClients(t, func(t *testing.T, n *node, c client) {
		n.proxy(impatient...)
		for name, tc := range map[string]struct{ role, says string }{"denied": {"nobody", c.denied}, "plain": {"", c.plain}} {
			pod := n.run(name, tc.role)
			before := n.refusals()
			n.starts(pod, c).wantFailure(tc.says)
			if refused := n.refusals() - before; refused < 1 || refused > 2 {
				t.Errorf("%s: refused %d times", name, refused)
			}
		}
	})
}

// TestCarelessClientsAreTold is the same for clients that take every answer with status 200 for
// credentials: they fail as they should, and neither crash nor end as if all were well.
func TestCarelessClientsAreTold(t *testing.T) {
	for _, c := range careless {
		t.Run(c.name, func(t *testing.T) {
			onThese(t, []setup{routed}, func(t *testing.T, n *node) {
				n.proxy(impatient...)
				n.starts(n.run("served", "app"), c).wantOwn("app")
				n.starts(n.run("denied", "nobody"), c).wantFailure(c.denied)
				n.starts(n.run("plain", ""), c).wantFailure(c.plain)
			})
		})
	}
}

// TestClientsWaitForSTS has STS answer late, or with a fault that passes: a client gets the pod's
// credentials in the end, by its own patience or when its program is started again.
func TestClientsWaitForSTS(t *testing.T) {
	onClients(t, func(t *testing.T, n *node, c client) {
		n.proxy(impatient...)
		for name, fault := range map[string]sts.Fault{"throttling": sts.Throttled, "unavailable": sts.Unavailable} {
			n.STS.SetFault(fault)
			pod := n.run(name, "app")
			n.starts(pod, c).wantFailure(c.later)
			n.STS.SetFault(sts.Fault{})
			n.eventually(func() bool { return n.get(pod, credentials+"app").status == http.StatusOK })
			n.starts(pod, c).wantOwn("app")
		}
		n.STS.SetFault(sts.Fault{Latency: 1500 * time.Millisecond})
		pod := n.run("slow", "app")
		p := n.starts(pod, c)
		if !c.patient {
			// It asks once, for a second: whether the credentials, which were asked for when the
			// pod came, are there by then is a matter of how fast it starts.
			if _, err := p.out.Peek(1); err != nil {
				p.failed()
				n.eventually(func() bool { return n.get(pod, credentials+"app").status == http.StatusOK })
				p = n.starts(pod, c)
			}
		}
		p.wantOwn("app")
	})
}
