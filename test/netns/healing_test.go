package netns

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// round has the agent make one round.
func (n *node) round(flags ...string) string {
	n.t.Helper()
	log, err := n.AgentRound(n.t.Context(), append([]string{"--backend", n.backend}, flags...)...)
	n.must(err)
	return log
}

// wantQuiet wants that a round finds nothing to do, and does nothing.
func (n *node) wantQuiet() {
	n.t.Helper()
	rules, records := n.rules(), n.records()
	if log := n.round(); log != "" {
		n.t.Errorf("a round with nothing to do said\n%s", log)
	}
	if diff := cmp.Diff(rules, n.rules()); diff != "" {
		n.t.Errorf("a round with nothing to do changed rules (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(records, n.records()); diff != "" {
		n.t.Errorf("a round with nothing to do changed records (-before +after):\n%s", diff)
	}
}

// others makes rules of other programs, in every form, next to where ours are.
func (n *node) others() {
	n.t.Helper()
	for _, form := range []string{"iptables-nft", "iptables-legacy"} {
		for _, rule := range []string{
			"-t nat -N KUBE-SERVICES",
			"-t nat -A PREROUTING -m comment --comment kube -j KUBE-SERVICES",
			"-t nat -A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.200.0.9:6443",
			"-t nat -A PREROUTING -d 169.254.169.254/32 -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8181",
			"-t filter -A FORWARD -s 10.99.0.0/16 -j ACCEPT",
			"-t mangle -A POSTROUTING -d 10.99.0.0/16 -j ACCEPT",
		} {
			n.onNode(form + " " + rule)
		}
	}
	for _, family := range []string{"bridge", "ip", "inet"} {
		n.onNode("nft add table " + family + " somebody")
		n.onNode("nft add chain " + family + " somebody early { type filter hook prerouting priority -10 ; }")
		n.onNode("nft add rule " + family + " somebody early ip daddr 169.254.169.254 counter")
	}
}

var ofOurs = regexp.MustCompile(`(?i)kube2iam|169\.254\.169\.254 \. 80`)

// foreign is what stands of others: all rules but ours.
func (n *node) foreign() string {
	n.t.Helper()
	var kept []string
	for line := range strings.Lines(n.rules()) {
		if !ofOurs.MatchString(line) && !strings.HasPrefix(line, "nft ") {
			kept = append(kept, strings.TrimSpace(line))
		}
	}
	for _, family := range []string{"bridge", "ip", "inet"} {
		kept = append(kept, n.onNode("nft list table "+family+" somebody"))
	}
	before, _, _ := strings.Cut(strings.Join(kept, "\n"), "== nftables")
	return before
}

// TestFlushedRules is a node whose redirections somebody flushes: pods are refused, and have their credentials again after a
// round. What is others' is as it was, through it all.
func TestFlushedRules(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		one, two := n.run("one", "app"), n.run("two", "other")
		n.wantQuiet()
		rules := n.rules()
		n.flush()
		for _, s := range []*testbed.Sandbox{one, two} {
			if got := n.get(s, credentials); !got.refused() {
				t.Errorf("%s, flushed: %s, want a refused connection", s.Name, got)
			}
		}
		if log := n.round(); !strings.Contains(log, "repaired the node's rules") {
			t.Errorf("the agent said %q", log)
		}
		if diff := cmp.Diff(sortedLines(rules), sortedLines(n.rules())); diff != "" {
			t.Errorf("rules before the flush and after the round (-before +after):\n%s", diff)
		}
		n.wantOwn(one, "app")
		n.wantOwn(two, "other")
		n.wantQuiet()

		n.flushAll()
		n.round()
		n.wantOwn(one, "app")
		n.wantOwn(two, "other")
		if diff := cmp.Diff(sortedLines(withoutChains(rules)), sortedLines(withoutChains(n.rules()))); diff != "" {
			t.Errorf("rules before everything was flushed and after the round (-before +after):\n%s", diff)
		}
		n.wantQuiet()
		n.wantOnlyTheNodeAsked()
	})
}

func sortedLines(s string) []string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		for j := i + 1; j < len(lines); j++ {
			if lines[j] < lines[i] {
				lines[i], lines[j] = lines[j], lines[i]
			}
		}
	}
	return lines
}

// withoutChains leaves out which of its tables and built-in chains an iptables command has made.
func withoutChains(rules string) string {
	var kept []string
	for line := range strings.Lines(rules) {
		if !strings.HasPrefix(line, ":") && !strings.HasPrefix(line, "*") && !strings.HasPrefix(line, "COMMIT") {
			kept = append(kept, strings.TrimSpace(line))
		}
	}
	return strings.Join(kept, "\n")
}

// TestOthersRulesSurvive compares what is others' byte for byte before anything of ours and after everything.
func TestOthersRulesSurvive(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.others()
		before := n.foreign()
		same := func(after string) {
			t.Helper()
			if diff := cmp.Diff(before, n.foreign()); diff != "" {
				t.Errorf("others' rules after %s (-before +after):\n%s", after, diff)
			}
		}
		n.round()
		same("the agent's first round")
		pod := n.run("pod", "app")
		same("ADD")
		n.must(n.AddAgain(t.Context(), pod, pod.Result))
		same("a second ADD")
		n.unattend(pod)
		n.round()
		same("a round that collected")
		n.must(n.Del(t.Context(), pod.Runtime()))
		same("a late DEL")
		stays := n.run("stays", "app")
		if n.backend == "nftables" {
			n.onNode("nft delete table ip kube2iam-cni")
		} else {
			n.onNode(n.backend + " -t nat -F KUBE2IAM-CNI")
		}
		n.round()
		same("a round that repaired")
		n.must(n.GC(t.Context()))
		same("GC")
		n.wantNoTrace(stays)
	})
}

// unattend takes a pod away without a DEL: its network namespace ends, and with it the veth.
func (n *node) unattend(s *testbed.Sandbox) {
	n.t.Helper()
	link := n.record(s, "eth0").HostLink.Name
	n.must(s.Netns.Close())
	n.eventually(func() bool {
		gone := false
		n.must(n.Node.Do(func() error {
			_, err := netlink.LinkByName(link)
			gone = err != nil
			return nil
		}))
		return gone
	})
}

// TestNoDEL is a pod that goes without a DEL: a round takes away what is left of it, and an heir of its address has never
// been its former owner.
func TestNoDEL(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		stays, goes := n.run("stays", "app"), n.run("goes", "other")
		n.unattend(goes)
		if log := n.round(); !strings.Contains(log, "collecting an attachment that is gone") {
			t.Errorf("the agent said %q", log)
		}
		n.wantNoTrace(goes)
		n.wantQuiet()
		n.wantOwn(stays, "app")
		n.must(n.Del(t.Context(), goes.Runtime()))
	})
}

// TestReusedAddressAndVeth is a runtime that gives an address and a veth's name to the next pod, and never sent the DEL of
// the one before; the agent comes before the heir, after it, or not at all, and the late DEL after that.
func TestReusedAddressAndVeth(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		for i, when := range []string{"before", "after", "never"} {
			former := n.run(fmt.Sprintf("former%d", i), "other")
			n.wantOwn(former, "other")
			veth := n.record(former, "eth0").HostLink.Name
			n.unattend(former)
			n.must(n.KubeAPI.DeletePod("default", former.Name))
			n.must(os.Remove(filepath.Join(n.Dir, "ipam", testbed.Network, former.IP.String())))
			if when == "before" {
				n.round()
			}
			heir := n.heir(fmt.Sprintf("heir%d", i), "app", former, veth)
			if got := n.record(heir, "eth0"); got.HostLink.Name != veth || heir.IP != former.IP {
				t.Fatalf("the heir has %s at %s, not its predecessor's", heir.IP, got.HostLink.Name)
			}
			n.wantOwn(heir, "app")
			if when == "after" {
				n.round()
				n.wantOwn(heir, "app")
			}
			rules, records := n.rules(), n.records()
			n.must(n.delOurs(former))
			if diff := cmp.Diff(rules, n.rules()); diff != "" {
				t.Errorf("%s: the late DEL changed rules (-before +after):\n%s", when, diff)
			}
			if diff := cmp.Diff(records, n.records()); diff != "" {
				t.Errorf("%s: the late DEL changed records (-before +after):\n%s", when, diff)
			}
			n.wantOwn(heir, "app")
			n.must(n.StopPod(t.Context(), heir))
			n.wantNoTrace(heir)
		}
	})
}

// heir is a pod that gets the address of a former one, and a veth of the same name.
func (n *node) heir(name, role string, former *testbed.Sandbox, veth string) *testbed.Sandbox {
	n.t.Helper()
	chain := n.SetChain()
	s := n.pending(name, role)
	s.IP = former.IP
	n.must(n.Add(n.t.Context(), s))
	n.must(n.Node.Do(func() error {
		for _, i := range s.Result.Interfaces {
			if link, err := netlink.LinkByName(i.Name); err == nil && i.Sandbox == "" && link.Type() == "veth" {
				if err := netlink.LinkSetDown(link); err != nil {
					return err
				}
				if err := netlink.LinkSetName(link, veth); err != nil {
					return err
				}
				if err := netlink.LinkSetUp(link); err != nil {
					return err
				}
				i.Name = veth
				return n.routeTo(link, s)
			}
		}
		return fmt.Errorf("no veth in %+v", s.Result)
	}))
	n.SetChain(chain...)
	n.must(n.AddAgain(n.t.Context(), s, s.Result))
	n.must(n.KubeAPI.SetStatus("default", name, "Running", s.IP.String()))
	return s
}

// routeTo makes the route again that went when the veth was down.
func (n *node) routeTo(link netlink.Link, s *testbed.Sandbox) error {
	if n.primary == "bridge" {
		return nil
	}
	return netlink.RouteReplace(&netlink.Route{
		LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: s.IP.AsSlice(), Mask: net.CIDRMask(32, 32)},
	})
}

// delOurs is the DEL of our plugin alone: the primary plugin's would take away what is its successor's by now.
func (n *node) delOurs(s *testbed.Sandbox) error {
	return n.CallOurs(n.t.Context(), "DEL", s, nil)
}

// TestReboot is a node whose state directory and rules are gone, and whose pods' sandboxes are new.
func TestReboot(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		p := n.proxy(impatient...)
		before := n.run("before", "other")
		n.must(p.Stop())
		n.must(n.StopPod(t.Context(), before))
		n.flushAll()
		n.must(os.RemoveAll(n.StateDir))
		// The agent comes first: no pod that comes before the plugin's first ADD has a way out.
		n.round()
		chain := n.SetChain()
		old := n.run("old", "app")
		for _, path := range []string{credentials, "/latest/meta-data/instance-id"} {
			if got := n.get(old, path); !got.refused() {
				t.Errorf("a pod after the reboot asks for %s: %s, want a refused connection", path, got)
			}
		}
		n.SetChain(chain...)
		n.proxy(impatient...)
		n.wantOwn(n.run("new", "app"), "app")
		n.round()
		n.wantOwn(old, "app")
		n.wantOnlyTheNodeAsked()
	})
}

// TestAdopted is a pod that was there before the plugin: refused from the agent's first look on, its connections to the real
// service are cut, and it has its own credentials without being recreated.
func TestAdopted(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		chain := n.SetChain()
		old, plain, nopod := n.run("old", "app"), n.run("plain", ""), n.run("finished", "other")
		held := n.hold(old)
		if status := held.ask(t, credentials); status != http.StatusOK {
			t.Fatalf("without the plugin: %d, want the node's own role", status)
		}
		n.IMDS.Reset()
		n.proxy(impatient...)
		n.must(nopod.Netns.Close())
		n.SetChain(chain...)
		log := n.round()
		for _, want := range []string{`pod=old`, `pod=plain`} {
			if !strings.Contains(log, "adopted a pod") || !strings.Contains(log, want) {
				t.Errorf("the agent said\n%s", log)
			}
		}
		if status := held.ask(t, credentials+testbed.NodeRole); status != 0 {
			t.Errorf("the connection that was held open answers %d", status)
		}
		n.wantOwn(old, "app")
		n.wantStatus(plain, credentials, http.StatusNotFound)
		n.wantQuiet()
		n.must(n.Check(t.Context(), old))
		n.must(n.StopPod(t.Context(), old))
		n.wantNoTrace(old)
		n.wantOnlyTheNodeAsked()
	})
}

// TestAdoptedWithoutNetns is the cache of an older libcni, which does not say where a pod's network namespace is.
func TestAdoptedWithoutNetns(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		chain := n.SetChain()
		old := n.run("old", "app")
		n.SetChain(chain...)
		entries, err := filepath.Glob(filepath.Join(n.Dir, "cni", "results", "*"))
		n.must(err)
		for _, file := range entries {
			data, err := os.ReadFile(file)
			n.must(err)
			without := regexp.MustCompile(`"netns":"[^"]*",`).ReplaceAll(data, nil)
			if len(without) == len(data) {
				t.Fatalf("no netns in %s", data)
			}
			n.must(os.WriteFile(file, without, 0o600))
		}
		n.proxy(impatient...)
		n.round()
		n.wantOwn(old, "app")
	})
}

// TestCutWithoutGuard is adoption where nothing but connection tracking cuts what is held open.
func TestCutWithoutGuard(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		chain := n.SetChain()
		old := n.run("old", "app")
		// Connections are tracked on most nodes; here something has to ask for it.
		n.onNode("nft add table ip tracks")
		n.onNode("nft add chain ip tracks early { type filter hook prerouting priority 0 ; }")
		n.onNode("nft add rule ip tracks early ct state established counter")
		held := n.hold(old)
		if status := held.ask(t, credentials); status != http.StatusOK {
			t.Fatalf("without the plugin: %d, want the node's own role", status)
		}
		n.IMDS.Reset()
		n.proxy(impatient...)
		n.SetChain(chain...)
		if log := n.round("--guard=false"); !strings.Contains(log, "ended connections that were not redirected") {
			t.Errorf("the agent said\n%s", log)
		}
		if status := held.ask(t, credentials+testbed.NodeRole); status != 0 {
			t.Errorf("the connection that was held open answers %d", status)
		}
		n.wantOwn(old, "app")
	})
}

// held is a connection to the metadata service that a pod keeps open.
type held struct {
	conn   net.Conn
	reader *bufio.Reader
}

func (n *node) hold(s *testbed.Sandbox) *held {
	n.t.Helper()
	conn, err := s.Netns.Dial("tcp", testbed.MetadataAddr)
	n.must(err)
	n.t.Cleanup(func() { conn.Close() })
	return &held{conn, bufio.NewReader(conn)}
}

// ask is the status of an answer, 0 where there is none.
func (h *held) ask(t *testing.T, path string) int {
	t.Helper()
	h.conn.SetDeadline(deadline())
	if _, err := fmt.Fprintf(h.conn, "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", path); err != nil {
		return 0
	}
	resp, err := http.ReadResponse(h.reader, nil)
	if err != nil {
		return 0
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	return resp.StatusCode
}

// TestAgentLives is the agent as it runs: it repairs what is flushed by itself, and its end changes nothing.
func TestAgentLives(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		p := n.proxy(impatient...)
		interval := "1h" // the kernel tells
		if n.backend == "iptables-legacy" {
			interval = "1s"
		}
		agent, err := n.StartAgent("--backend", n.backend, "--interval", interval)
		n.must(err)
		pod := n.run("pod", "app")
		n.wantOwn(pod, "app")
		n.flush()
		n.eventually(func() bool { return n.get(pod, credentials).status == http.StatusOK })
		n.wantOwn(pod, "app")
		n.flushAll()
		n.eventually(func() bool { return n.Check(t.Context(), pod) == nil })
		n.wantOwn(pod, "app")
		n.IMDS.Reset()

		rules, records := n.rules(), n.records()
		n.must(agent.Stop())
		if diff := cmp.Diff(rules, n.rules()); diff != "" {
			t.Errorf("rules before the agent's end and after it (-before +after):\n%s", diff)
		}
		if diff := cmp.Diff(records, n.records()); diff != "" {
			t.Errorf("records before the agent's end and after it (-before +after):\n%s", diff)
		}
		n.wantOwn(pod, "app")
		n.flush()
		refused := func(when string) {
			t.Helper()
			if got := n.get(pod, credentials); !got.refused() {
				t.Errorf("%s: %s, want a refused connection", when, got)
			}
		}
		refused("flushed, the agent stopped")
		n.must(p.Stop())
		refused("flushed, the agent and the proxy stopped")
		n.round()
		refused("repaired, the proxy stopped")
		n.proxy(impatient...)
		n.wantOwn(pod, "app")
		n.wantOnlyTheNodeAsked()
	})
}

// TestAgentInAContainer is the agent with the host's root mounted somewhere else: every path is the host's, and so is
// iptables, of which its own root has none.
func TestAgentInAContainer(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		built, err := tools()
		n.must(err)
		plugin, err := built.Path("kube2iam-cni")
		n.must(err)
		chain := n.SetChain()
		old := n.run("old", "app")
		n.SetChain(chain...)
		root := filepath.Join(n.Dir, "container")
		n.must(os.MkdirAll(filepath.Join(root, "host"), 0o755))
		binary, err := os.ReadFile(plugin)
		n.must(err)
		n.must(os.WriteFile(filepath.Join(root, "agent"), binary, 0o755))
		container := fmt.Sprintf("mount --make-rprivate / && mount --rbind / %[1]s/host && exec chroot %[1]s /agent agent --once --host-root /host "+
			"--backend %[2]s --state-dir %[3]s --cni-cache-dir %[4]s/cni --netns-dir %[4]s/netns", root, n.backend, n.StateDir, n.Dir)
		_, err = n.Node.Run(t.Context(), n.ClientEnv(), "unshare", "-m", "sh", "-c", container)
		n.must(err)
		n.proxy(impatient...)
		n.wantOwn(old, "app")
		if got := n.record(old, "eth0").Backend; got != n.backend {
			t.Errorf("recorded %s", got)
		}
	})
}
