package netns

import (
	"io"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// record returns the record of one of the sandbox's interfaces.
func (n *node) record(s *testbed.Sandbox, ifName string) *attachment.Record {
	n.t.Helper()
	r, err := attachment.In(n.StateDir).Get(s.ContainerID, ifName)
	n.must(err)
	return r
}

// TestDatapathOfEachTopology: the plugin recognises each topology and matches its interface in
// the rule.
func TestDatapathOfEachTopology(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy()
		pod := n.run("pod", "app")
		n.wantOwn(pod, "app")
		n.must(n.Check(t.Context(), pod))
		record, rules := n.record(pod, "eth0"), n.rules()
		wantPath, wantRule := attachment.DatapathRouted, "-i "+record.HostLink.Name
		if n.primary == "bridge" {
			wantPath, wantRule = attachment.DatapathBridged, "--physdev-in "+record.HostLink.Name
		}
		if n.backend == "nftables" {
			wantRule = map[attachment.Datapath]string{
				attachment.DatapathRouted:  `ip routed: "` + record.HostLink.Name + `" . ` + pod.IP.String(),
				attachment.DatapathBridged: "ip bridged: " + pod.IP.String(),
			}[wantPath]
		}
		if record.Datapath != wantPath || string(record.Backend) != n.backend {
			t.Errorf("recorded %s, %s; want %s, %s", record.Datapath, record.Backend, wantPath, n.backend)
		}
		if !strings.Contains(rules, wantRule) {
			t.Errorf("no rule with %q:\n%s", wantRule, rules)
		}
		if n.backend == "nftables" && strings.Contains(rules, "KUBE2IAM-CNI") {
			t.Errorf("the nftables backend made iptables rules:\n%s", rules)
		}
		// Whatever marks are set, they are gone before routing.
		if strings.Contains(n.onNode("conntrack -L"), "mark=4096") {
			t.Error("a mark has got into connection tracking")
		}
	})
}

// TestSeveralInterfaces: each interface of a pod on two networks has its own redirection, which
// its DEL removes.
func TestSeveralInterfaces(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy()
		pod := n.run("pod", "app")
		rules, records := n.rules(), n.records()
		second, err := n.AddSecond(t.Context(), pod)
		n.must(err)
		if first, other := n.record(pod, "eth0"), n.record(pod, "net1"); other.HostLink == first.HostLink || len(first.IPs) != 1 || first.IPs[0] != pod.IP ||
			len(other.IPs) != 1 || other.IPs[0] != second {
			t.Errorf("recorded\n%+v\n%+v", first, other)
		}
		n.wantOwn(pod, "app")
		// What the pod sends by one interface from the address of the other is nobody's.
		n.wantSilenceOrRefusal(pod, second)
		n.must(n.DelSecond(t.Context(), pod))
		if diff := cmp.Diff(rules, n.rules()); diff != "" {
			t.Errorf("rules before the second ADD and after its DEL (-before +after):\n%s", diff)
		}
		if diff := cmp.Diff(records, n.records()); diff != "" {
			t.Errorf("records before the second ADD and after its DEL (-before +after):\n%s", diff)
		}
		n.wantOwn(pod, "app")
		second, err = n.AddSecond(t.Context(), pod)
		n.must(err)
		n.must(n.Del(t.Context(), pod.Runtime()))
		if left := n.records(); !cmp.Equal(left, []string{pod.ContainerID + "@net1", second.String()}) {
			t.Errorf("after the first interface's DEL: %v", left)
		}
		n.must(n.DelSecond(t.Context(), pod))
		n.wantNoTrace(pod)
	})
}

// TestPodWithoutVeth: the packets of a pod on a macvlan or an ipvlan never pass the node's
// rules. Its redirection is inside the pod, and the log says that it is no boundary.
func TestPodWithoutVeth(t *testing.T) {
	for _, kind := range []string{"macvlan", "ipvlan"} {
		for _, path := range []string{"auto", "pod"} {
			t.Run(kind+" "+path, func(t *testing.T) {
				if kind == "ipvlan" {
					needIPVLAN(t)
				}
				noVeth(t, kind, path)
			})
		}
	}
}

// needIPVLAN skips a test if the kernel says that it has no ipvlan.
func needIPVLAN(t *testing.T) {
	t.Helper()
	out, err := exec.Command("unshare", "-n", "sh", "-c", "ip link add veth0 type veth peer name veth1 && ip link add ipvlan0 link veth0 type ipvlan").CombinedOutput()
	if err != nil && strings.Contains(string(out), "Unknown device type") {
		t.Skipf("this kernel has no ipvlan: %s", out)
	}
}

func noVeth(t *testing.T, kind, path string) {
	entry := testbed.Kube2IAM("auto")
	entry["datapath"] = path
	onThese(t, []setup{{primary: kind, backend: "auto", chain: []testbed.Entry{entry}}}, func(t *testing.T, n *node) {
		p := n.proxy(impatient...)
		pod, neighbour, plain := n.run("pod", "app"), n.run("neighbour", "other"), n.run("plain", "")
		n.wantOwn(pod, "app")
		n.wantOwn(neighbour, "other")
		n.wantStatus(pod, credentials+"other", http.StatusNotFound)
		n.wantStatus(plain, credentials, http.StatusNotFound)
		if r := n.record(pod, "eth0"); r.Datapath != attachment.DatapathPod || r.HostLink != (attachment.HostLink{}) || r.Backend != "nftables" {
			t.Errorf("recorded %+v", r)
		}
		n.must(n.Check(t.Context(), pod))
		// The node is guarded from the first ADD on, whatever the pod's own interface is.
		guard := n.onNode("nft list table ip kube2iam-cni")
		if strings.Count(guard, `drop comment "drop"`) != 2 {
			t.Errorf("the node is not guarded:\n%s", guard)
		}
		n.onNode("nft delete table ip kube2iam-cni")
		if err := n.Check(t.Context(), pod); err == nil || !strings.Contains(err.Error(), "rules of chain guard") {
			t.Errorf("CHECK without a guard: %v", err)
		}
		_, err := n.AgentRound(t.Context(), "--datapath", path)
		n.must(err)
		n.must(n.Check(t.Context(), pod))
		// Dialled directly, from another pod's address: taken from those alone whose record says so.
		stranger, err := n.NewSandbox("default", "stranger", "uid-stranger")
		n.must(err)
		n.SetChain()
		n.must(n.Add(t.Context(), stranger))
		conn, err := stranger.Netns.Dial("tcp", testbed.NodeIP.String()+":8181")
		if err == nil {
			conn.SetDeadline(deadline())
			if _, err := conn.Read(make([]byte, 1)); err == nil {
				t.Error("a pod without a record got an answer")
			}
			conn.Close()
		}
		n.SetChain(entry)

		// What the pod undid the agent makes again.
		_, err = pod.Netns.Run(t.Context(), n.ClientEnv(), "nft", "flush", "ruleset")
		n.must(err)
		if err := n.Check(t.Context(), pod); err == nil {
			t.Error("CHECK did not see that the pod flushed its rules")
		}
		_, err = n.AgentRound(t.Context(), "--datapath", path)
		n.must(err)
		n.must(n.Check(t.Context(), pod))
		n.wantOwn(pod, "app")
		n.must(n.StopPod(t.Context(), neighbour))
		n.wantNoTrace(neighbour)
		n.must(p.Stop())
		if got := n.get(pod, credentials); !got.refused() {
			t.Errorf("without a proxy: %s, want a refused connection", got)
		}
		n.wantOnlyTheNodeAsked()
	})
}

// TestDualStack: a pod with addresses of both families gets the same at both addresses of the
// service.
func TestDualStack(t *testing.T) {
	var dual []setup
	for _, s := range setups {
		if s.primary != "calicolike" {
			s.ipv6 = true
			dual = append(dual, s)
		}
	}
	onThese(t, dual, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod, plain := n.run("pod", "app"), n.run("plain", "")
		n.wantOwn(pod, "app")
		n.wantOwnAt(pod, "http://"+testbed.MetadataAddr6, "app")
		for _, service := range []string{metadata, "http://" + testbed.MetadataAddr6} {
			if got := n.getAt(plain, service, credentials+"app"); got.status != http.StatusNotFound {
				t.Errorf("%s asks for another's role at %s: %s", plain.Name, service, got)
			}
		}
		n.must(n.Check(t.Context(), pod))
		// An address that the network did not give, of either family.
		for _, stranger := range []string{"10.201.0.200/32", "fd00:201::200/128"} {
			n.address(pod, "add", stranger)
			n.wantSilenceOrRefusal(pod, netip.MustParsePrefix(stranger).Addr())
		}
		n.must(n.StopPod(t.Context(), pod))
		n.wantNoTrace(pod)
		n.must(n.StopPod(t.Context(), plain))
		if records := n.records(); len(records) != 0 {
			t.Errorf("records after the last DEL: %v", records)
		}
		n.wantOnlyTheNodeAsked()
	})
}

// TestChainedWithOthers: the plugin works before and after other plugins of the CNI project.
// bandwidth redirects the pod's packets at the veth's ingress and back, firewall accepts what
// the guard refuses, and portmap has redirections of its own.
func TestChainedWithOthers(t *testing.T) {
	for name, place := range map[string]func(ours testbed.Entry, others []testbed.Entry) []testbed.Entry{
		"first": func(ours testbed.Entry, others []testbed.Entry) []testbed.Entry {
			return append([]testbed.Entry{ours}, others...)
		},
		"last": func(ours testbed.Entry, others []testbed.Entry) []testbed.Entry { return append(others, ours) },
		"middle": func(ours testbed.Entry, others []testbed.Entry) []testbed.Entry {
			return append(append(others[:2:2], ours), others[2:]...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var chained []setup
			for _, s := range setups {
				if s.primary == "calicolike" {
					continue
				}
				others := []testbed.Entry{
					{"type": "portmap", "backend": "iptables", "capabilities": map[string]bool{"portMappings": true},
						"runtimeConfig": map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}},
					{"type": "firewall", "backend": "iptables"},
					{"type": "tuning", "sysctl": map[string]string{"net.ipv4.conf.eth0.arp_notify": "1"}},
					{"type": "bandwidth", "ingressRate": 800000000, "ingressBurst": 80000000, "egressRate": 800000000, "egressBurst": 80000000},
				}
				s.chain = place(testbed.Kube2IAM(s.backend), others)
				chained = append(chained, s)
			}
			onThese(t, chained, func(t *testing.T, n *node) {
				n.proxy(impatient...)
				pod := n.run("pod", "app")
				n.wantOwn(pod, "app")
				n.must(n.Check(t.Context(), pod))
				n.wantOthersWork(pod)
				// firewall accepts everything of the pod, and still the guard has the last word.
				n.address(pod, "add", "10.201.0.200/32")
				n.wantSilenceOrRefusal(pod, netip.MustParseAddr("10.201.0.200"))
				n.must(n.Del(t.Context(), pod.Runtime()))
				n.must(n.Del(t.Context(), pod.Runtime()))
				n.wantNoTrace(pod)
				// What is left of them is theirs without us, too: chains, and no rule of the pod.
				if rules := n.rules(); strings.Contains(rules, ":8080") || strings.Contains(rules, "--dport 8080") {
					t.Errorf("portmap's rules are left:\n%s", rules)
				}
				n.wantOnlyTheNodeAsked()
			})
		})
	}
}

// wantOthersWork wants each of the other plugins to work.
func (n *node) wantOthersWork(pod *testbed.Sandbox) {
	n.t.Helper()
	listener, err := pod.Netns.Listen("tcp", ":80")
	n.must(err)
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, "the pod")
			conn.Close()
		}
	}()
	conn, err := n.AWS.Dial("tcp", testbed.NodeIP.String()+":8080")
	if err != nil {
		n.t.Errorf("portmap: %v", err)
	} else {
		conn.SetDeadline(deadline())
		if said, err := io.ReadAll(conn); string(said) != "the pod" {
			n.t.Errorf("portmap: %q, %v", said, err)
		}
		conn.Close()
	}
	if rules := n.onNode("iptables -S CNI-FORWARD"); !strings.Contains(rules, pod.IP.String()) {
		n.t.Errorf("firewall does not accept the pod's packets:\n%s", rules)
	}
	value, err := pod.Netns.Run(n.t.Context(), n.ClientEnv(), "cat", "/proc/sys/net/ipv4/conf/eth0/arp_notify")
	n.must(err)
	if strings.TrimSpace(value) != "1" {
		n.t.Errorf("tuning: arp_notify is %q", value)
	}
	if shapes := n.onNode("tc qdisc show"); strings.Count(shapes, "qdisc tbf") != 2 {
		n.t.Errorf("bandwidth does not shape both ways:\n%s", shapes)
	}
}
