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

// natSetups are routed and bridged pods with each backend, and with both families where needed.
func natSetups(ipv6 bool) []setup {
	all := []setup{bridgeIPTables, bridgeNFTables, routedIPTables, routed}
	for i := range all {
		all[i].ipv6 = ipv6
	}
	return all
}

// isIPTables tells whether the redirections are rules of iptables, which have no priority before other programs' NAT.
func (n *node) isIPTables() bool { return n.backend != "nftables" }

// web is a pod without a role that serves port 80: another program's rules send metadata requests to it.
func (n *node) web() *testbed.Sandbox {
	n.t.Helper()
	web := n.run("web", "")
	listener, err := web.Netns.Listen("tcp", ":80")
	n.must(err)
	n.t.Cleanup(func() { listener.Close() })
	return web
}

// wantLanding wants a connection from the pod's address to the metadata service to get to port 80 of the web pod, or, where
// web is nil, to the proxy.
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

// wantCheck wants CHECK to report all of the words, or nothing where there are none.
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

// restoreRules adds rules in iptables-restore's words.
func (n *node) restoreRules(command, rules string) {
	n.t.Helper()
	file := filepath.Join(n.Dir, "conf", "rules")
	n.must(os.WriteFile(file, []byte(rules), 0o600))
	n.onNode(command + "-restore --noflush " + file)
}

// nftRules adds rules in nft's words.
func (n *node) nftRules(rules string) {
	n.t.Helper()
	file := filepath.Join(n.Dir, "conf", "rules")
	n.must(os.WriteFile(file, []byte(rules), 0o600))
	n.onNode("nft -f " + file)
}

// portmap18 is what portmap writes with its nftables backend before 1.9.0 for a pod with hostPort 80. The chain at prerouting
// does not ask whether the destination is the node's.
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

// TestHostPortBeforePortmap19 is a pod with hostPort 80 under portmap's nftables backend before 1.9.0, whose NAT chain is
// registered after ours: it runs before a chain of iptables, and takes the metadata requests of all pods.
func TestHostPortBeforePortmap19(t *testing.T) {
	onThese(t, natSetups(false), func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod, web := n.run("pod", "app"), n.web()
		f := fronts(pod)[0]
		n.wantOwn(pod, "app")
		n.wantCheck(pod)
		n.nftRules(strings.ReplaceAll(portmap18, "$WEB", web.IP.String()))
		if !n.isIPTables() {
			n.wantLanding(pod, f, nil)
			n.wantCheck(pod)
			n.wantQuiet()
			n.wantOwn(pod, "app")
			return
		}
		const chain = "chain prerouting of table ip cni_hostport"
		n.wantLanding(pod, f, &web.IP)
		n.wantCheck(pod, chain)
		rules := n.rules()
		n.wantOneWarning(chain)
		if now := n.rules(); now != rules {
			t.Errorf("the agent changed rules:\n%s", now)
		}
		n.onNode("nft delete table ip cni_hostport")
		n.wantQuiet()
		n.wantCheck(pod)
		n.wantLanding(pod, f, nil)
	})
}

// wantOneWarning has an agent make rounds, and wants it to be ready and to warn of the conflict in the first one only.
func (n *node) wantOneWarning(conflict string) {
	n.t.Helper()
	agent, err := n.StartAgent("--backend", n.backend)
	n.must(err)
	n.eventually(func() bool { return strings.Contains(agent.Log(), conflict) })
	// Two repairs are two rounds more at least.
	for repairs := range 2 {
		n.onNode(n.backend + " -t nat -F KUBE2IAM-CNI")
		n.eventually(func() bool { return strings.Count(agent.Log(), "repaired the node's rules") > repairs })
	}
	n.must(agent.Stop())
	if log := agent.Log(); strings.Count(log, conflict) != 1 || strings.Count(log, "level=WARN") != 1 {
		n.t.Errorf("the agent said\n%s\nwant one warning of the %s", log, conflict)
	}
}

// TestHostPort is the same pod under the portmap that the suite builds: its chain asks for the node's addresses.
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
		if n.isIPTables() {
			// The kernel does not tell which of the chains comes first, nor anybody what all their rules match.
			n.wantCheck(pod, "chain prerouting of table ip cni_hostport")
		} else {
			n.wantCheck(pod)
		}
	})
}

// kubeProxy is what kube-proxy writes for a Service with externalIPs [fd00:ec2::254], and its jump, which it inserts first.
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

// TestExternalIP is a Service whose external IP is the metadata service's IPv6 address, under kube-proxy with iptables: its
// jump stands above ours until the agent's round.
func TestExternalIP(t *testing.T) {
	onThese(t, natSetups(true), func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod, web := n.run("pod", "app"), n.web()
		f, to := fronts(pod)[1], fronts(web)[1].pod
		n.wantOwnAt(pod, f.url, "app")
		kubeProxyForm := "ip6tables-nft"
		if n.isIPTables() {
			kubeProxyForm = strings.Replace(n.backend, "iptables", "ip6tables", 1)
		}
		n.restoreRules(kubeProxyForm, strings.ReplaceAll(kubeProxy, "$WEB", to.String()))
		if n.isIPTables() {
			n.wantLanding(pod, f, &to)
			n.wantCheck(pod, "first place of the jump to KUBE2IAM-CNI", "KUBE-SERVICES")
			if log := n.round(); strings.Count(log, "first place of the jump to KUBE2IAM-CNI") != 1 {
				t.Errorf("the agent's round said %q", log)
			}
		}
		n.wantLanding(pod, f, nil)
		n.wantOwnAt(pod, f.url, "app")
		n.wantCheck(pod)
		n.wantQuiet()
		if jumps := strings.Count(n.onNode(kubeProxyForm+" -t nat -S PREROUTING"), "-j KUBE-SERVICES"); jumps != 1 {
			t.Errorf("kube-proxy's jump stands %d times", jumps)
		}
	})
}

// TestOtherNATChains are other places where a NAT chain comes before that of iptables: an inet table, a lower priority, and the
// form of iptables that the redirections are not in.
func TestOtherNATChains(t *testing.T) {
	onThese(t, natSetups(false), func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod, web := n.run("pod", "app"), n.web()
		f := fronts(pod)[0]
		n.wantOwn(pod, "app")
		dnat := "-t nat -A PREROUTING -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination " + web.IP.String() + ":80"
		chain := "table %s other { chain pre { type nat hook prerouting priority %d; tcp dport 80 ip daddr 169.254.169.254 dnat ip to " + web.IP.String() + ":80; }; }\n"
		other, its := "iptables-legacy", "chain PREROUTING of iptables-legacy"
		if n.backend == "iptables-legacy" {
			other, its = "iptables-nft", "chain PREROUTING of table ip nat"
		}
		for _, tc := range []struct {
			make, unmake func()
			chain        string
		}{
			{func() { n.nftRules(fmt.Sprintf(chain, "inet", -100)) }, func() { n.onNode("nft delete table inet other") }, "chain pre of table inet other"},
			{func() { n.nftRules(fmt.Sprintf(chain, "ip", -101)) }, func() { n.onNode("nft delete table ip other") }, "chain pre of table ip other"},
			{func() { n.onNode(other + " " + dnat) }, func() { n.onNode(other + " -t nat -F PREROUTING") }, its},
		} {
			tc.make()
			if n.isIPTables() {
				n.wantLanding(pod, f, &web.IP)
				n.wantCheck(pod, tc.chain)
			} else {
				n.wantLanding(pod, f, nil)
				n.wantCheck(pod)
			}
			tc.unmake()
			n.wantLanding(pod, f, nil)
			n.wantCheck(pod)
		}
	})
}
