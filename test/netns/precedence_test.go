package netns

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// natSetups are routed and bridged pods with nftables, whose redirection comes before the NAT of
// other programs. With iptables it does not (docs/compatibility.md).
func natSetups(ipv6 bool) []setup {
	all := []setup{bridgeNFTables, routed}
	for i := range all {
		all[i].ipv6 = ipv6
	}
	return all
}

// web runs a pod without a role that serves port 80. Another program's rules send metadata
// requests to it.
func (n *node) web() *testbed.Sandbox {
	n.t.Helper()
	web := n.run("web", "")
	listener, err := web.Netns.Listen("tcp", ":80")
	n.must(err)
	n.t.Cleanup(func() { listener.Close() })
	return web
}

// wantLanding wants a connection from the pod's address to the metadata service to reach port 80
// of the web pod, or the proxy if web is nil.
func (n *node) wantLanding(pod *testbed.Sandbox, f front, web *netip.Addr) {
	n.t.Helper()
	want := netip.AddrPortFrom(testbed.NodeIP, 8181)
	if f.pod.Is6() {
		want = netip.AddrPortFrom(testbed.NodeIP6, 8181)
	}
	if web != nil {
		want = netip.AddrPortFrom(*web, 80)
	}
	var to netip.AddrPort
	n.eventually(func() (landed bool) { // on a bridge, not before the web pod is known as a neighbour
		source, _ := n.dialService(pod, f.pod)
		to, landed = n.landing(source)
		return landed
	})
	if to != want {
		n.t.Errorf("a metadata request from %s landed at %s, want %s", f.pod, to, want)
	}
}

// wantCheck wants CHECK to report all of the words, or nothing if there are none.
func (n *node) wantCheck(pod *testbed.Sandbox, words ...string) {
	n.t.Helper()
	err := n.Check(n.t.Context(), pod)
	if len(words) == 0 {
		n.must(err)
		return
	}
	for _, word := range words {
		if err == nil || !strings.Contains(err.Error(), word) {
			n.t.Errorf("CHECK says %v, want it to report %q", err, word)
		}
	}
}

// restoreRules adds rules in the format of iptables-restore.
func (n *node) restoreRules(command, rules string) {
	n.t.Helper()
	file := filepath.Join(n.Dir, "conf", "rules")
	n.must(os.WriteFile(file, []byte(rules), 0o600))
	n.onNode(command + "-restore --noflush " + file)
}

// nftRules adds rules in the format of nft.
func (n *node) nftRules(rules string) {
	n.t.Helper()
	file := filepath.Join(n.Dir, "conf", "rules")
	n.must(os.WriteFile(file, []byte(rules), 0o600))
	n.onNode("nft -f " + file)
}

// portmap18 is what portmap writes with its nftables backend before 1.9.0 for a pod with hostPort
// 80. The chain at prerouting does not ask whether the destination is the node's.
const portmap18 = `table ip cni_hostport {
	comment "CNI portmap plugin"
	chain hostports {
		tcp dport 80 dnat to $WEB:80
	}
	chain hostip_hostports {
	}
	chain prerouting {
		type nat hook prerouting priority dstnat;
		jump hostip_hostports
		jump hostports
	}
}
`

// TestHostPortBeforePortmap19: portmap before 1.9.0 registers its NAT chain after the plugin's.
// A pod with hostPort 80 receives no metadata request.
func TestHostPortBeforePortmap19(t *testing.T) {
	onThese(t, natSetups(false), func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod, web := n.run("pod", "app"), n.web()
		f := fronts(pod)[0]
		n.wantOwn(pod, "app")
		n.wantCheck(pod)
		n.round() // guards the uplinks
		n.nftRules(strings.ReplaceAll(portmap18, "$WEB", web.IP.String()))
		n.wantLanding(pod, f, nil)
		n.wantCheck(pod)
		n.wantIdle()
		n.wantOwn(pod, "app")
	})
}

// TestHostPort: the same with the portmap that the suite builds, whose chain matches the node's
// addresses only.
func TestHostPort(t *testing.T) {
	all := natSetups(false)
	for i := range all {
		all[i].chain = []testbed.Entry{testbed.Kube2IAM(all[i].backend),
			{"type": "portmap", "backend": "nftables", "capabilities": map[string]bool{"portMappings": true},
				"runtimeConfig": map[string]any{"portMappings": []map[string]any{{"hostPort": 80, "containerPort": 80, "protocol": "tcp"}}}}}
	}
	onThese(t, all, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		portmap := n.SetChain(testbed.Kube2IAM(n.backend))
		pod := n.run("pod", "app")
		n.SetChain(portmap...)
		n.web()
		n.SetChain(testbed.Kube2IAM(n.backend))
		if !strings.Contains(n.onNode("nft list table ip cni_hostport"), "tcp dport 80 dnat") {
			t.Fatal("portmap made no rule")
		}
		n.wantLanding(pod, fronts(pod)[0], nil)
		n.wantOwn(pod, "app")
		n.wantCheck(pod)
	})
}

// kubeProxy is what kube-proxy writes for a Service with externalIPs [fd00:ec2::254], and its jump,
// which it inserts first.
const kubeProxy = `*nat
:KUBE-SERVICES - [0:0]
:KUBE-EXT-TEST - [0:0]
:KUBE-SVC-TEST - [0:0]
:KUBE-SEP-TEST - [0:0]
-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -d fd00:ec2::254/128 -p tcp -m comment --comment "default/test external IP" -m tcp --dport 80 -j KUBE-EXT-TEST
-A KUBE-EXT-TEST -j KUBE-SVC-TEST
-A KUBE-SVC-TEST -m comment --comment "default/test -> [$WEB]:80" -j KUBE-SEP-TEST
-A KUBE-SEP-TEST -p tcp -m comment --comment default/test -m tcp -j DNAT --to-destination [$WEB]:80
COMMIT
`

// TestExternalIP: a Service whose external IP is the metadata service's IPv6 address receives no
// metadata request under kube-proxy with iptables.
func TestExternalIP(t *testing.T) {
	onThese(t, natSetups(true), func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod, web := n.run("pod", "app"), n.web()
		f, to := fronts(pod)[1], fronts(web)[1].pod
		n.wantOwnAt(pod, f.url, "app")
		n.round() // guards the uplinks
		const kubeProxyForm = "ip6tables-nft"
		n.restoreRules(kubeProxyForm, strings.ReplaceAll(kubeProxy, "$WEB", to.String()))
		n.wantLanding(pod, f, nil)
		n.wantOwnAt(pod, f.url, "app")
		n.wantCheck(pod)
		n.wantIdle()
		if jumps := strings.Count(n.onNode(kubeProxyForm+" -t nat -S PREROUTING"), "-j KUBE-SERVICES"); jumps != 1 {
			t.Errorf("kube-proxy's jump stands %d times", jumps)
		}
	})
}

// TestOtherNATChains: NAT chains of other programs, in an inet table, at a lower priority than
// destination NAT and by both iptables commands, receive no metadata request.
func TestOtherNATChains(t *testing.T) {
	onThese(t, natSetups(false), func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod, web := n.run("pod", "app"), n.web()
		f := fronts(pod)[0]
		n.wantOwn(pod, "app")
		dnat := "-t nat -A PREROUTING -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination " + web.IP.String() + ":80"
		chain := "table %s other { chain pre { type nat hook prerouting priority %d; tcp dport 80 ip daddr 169.254.169.254 dnat ip to " + web.IP.String() + ":80; }; }\n"
		for _, tc := range []struct {
			make, unmake func()
		}{
			{func() { n.nftRules(fmt.Sprintf(chain, "inet", -100)) }, func() { n.onNode("nft delete table inet other") }},
			{func() { n.nftRules(fmt.Sprintf(chain, "ip", -101)) }, func() { n.onNode("nft delete table ip other") }},
			{func() { n.onNode("iptables-legacy " + dnat) }, func() { n.onNode("iptables-legacy -t nat -F PREROUTING") }},
			{func() { n.onNode("iptables-nft " + dnat) }, func() { n.onNode("iptables-nft -t nat -F PREROUTING") }},
		} {
			tc.make()
			n.wantLanding(pod, f, nil)
			n.wantCheck(pod)
			tc.unmake()
			n.wantLanding(pod, f, nil)
			n.wantCheck(pod)
		}
	})
}
