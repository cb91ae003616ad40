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

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// TestAdopted: a pod older than the plugin is refused from the agent's first round, its open
// connections to the real service are cut, and it gets its own credentials without being
// recreated.
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
		n.wantIdle()
		n.must(n.Check(t.Context(), old))
		n.must(n.StopPod(t.Context(), old))
		n.wantNoTrace(old)
		n.wantOnlyTheNodeAsked()
	})
}

// TestAdoptedWithoutNetns: the agent adopts a pod from the cache of an older libcni, which does
// not record the pod's network namespace.
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

// TestCutWithoutGuard: without the guard, adoption cuts the pod's open connections by connection
// tracking.
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

// ask returns the status of an answer, or 0 if there is none.
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

// TestAgentInAContainer: an agent whose own root has no iptables uses the paths and the iptables
// of the host's root, which is mounted elsewhere.
func TestAgentInAContainer(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		built, err := tools()
		n.must(err)
		agent, err := built.Path("kube2iam-agent")
		n.must(err)
		chain := n.SetChain()
		old := n.run("old", "app")
		n.SetChain(chain...)
		root := filepath.Join(n.Dir, "container")
		n.must(os.MkdirAll(filepath.Join(root, "host"), 0o755))
		n.must(os.Mkdir(filepath.Join(root, "proc"), 0o755))
		// By a process of its own: a child that another test forks would hold this one's file open
		// for writing.
		_, err = n.Node.Run(t.Context(), n.ClientEnv(), "cp", agent, filepath.Join(root, "agent"))
		n.must(err)
		container := fmt.Sprintf("mount --make-rprivate / && mount --rbind / %[1]s/host && mount -t proc proc %[1]s/proc && exec chroot %[1]s /agent run --once --host-root /host "+
			"--backend %[2]s --state-dir %[3]s --cni-cache-dir %[4]s/cni --cni-conf-dir %[4]s/net.d --netns-dir %[4]s/netns", root, n.backend, n.StateDir, n.Dir)
		_, err = n.Node.Run(t.Context(), n.ClientEnv(), "unshare", "-m", "sh", "-c", container)
		n.must(err)
		n.proxy(impatient...)
		n.wantOwn(old, "app")
		if got := n.record(old, "eth0").Backend; string(got) != n.backend {
			t.Errorf("recorded %s", got)
		}
	})
}

// TestNotChained: a pod of a network without the plugin is refused, and no round adopts it
// before the plugin is chained.
func TestNotChained(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		chain := n.SetChain()
		pod := n.run("pod", "app")
		n.proxy(impatient...)
		if said := n.round(); !strings.Contains(said, "not chained") {
			t.Errorf("the round said %s", said)
		}
		if records := n.records(); len(records) > 0 {
			t.Errorf("records of %v", records)
		}
		if got := n.get(pod, credentials); !got.refused() {
			t.Errorf("got %s, want a refused connection", got)
		}
		n.SetChain(chain...)
		n.round()
		n.wantOwn(pod, "app")
	})
}
