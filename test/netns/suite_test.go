// Package netns is the namespace suite: kube2iam-cni and kube2iam-proxy on a testbed, with the real
// bridge and ptp plugins and each backend. Whatever a test does, at its end the real metadata
// service must not have been asked for credentials but by the proxy for its own.
package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/ruleset"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

func TestMain(m *testing.M) { netnstest.MainAsRoot(m) }

const (
	roleKey     = "iam.amazonaws.com/role"
	metadata    = "http://" + testbed.MetadataAddr
	credentials = "/latest/meta-data/iam/security-credentials/"
)

var tools = sync.OnceValues(func() (testbed.Tools, error) {
	if err := testbed.Require("iptables-nft", "iptables-legacy", "nft", "conntrack", "strace", "ip", "/usr/bin/aws", "/usr/bin/python3", "/usr/bin/cloud-init"); err != nil {
		return nil, err
	}
	return testbed.BuildTools(context.Background(), false)
})

// node is a testbed with the plugin chained.
type node struct {
	*testbed.Bed
	t *testing.T
	setup
}

// setup is one way to run the plugin.
type setup struct {
	primary, backend string
	noBridgeNF       bool
	ipv6             bool
	chain            []testbed.Entry // in place of kube2iam-cni alone
}

func (s setup) String() string {
	name := s.primary
	if s.noBridgeNF {
		name += " without bridge-nf"
	}
	if s.ipv6 {
		name += ", dual stack"
	}
	return name + ", " + s.backend
}

// iptables is the backend of nodes without nftables. It serves routed pods, and bridged pods if
// bridge-nf is on.
const iptables = "iptables"

var (
	bridgeNFTables = setup{primary: "bridge", backend: "nftables"}
	bridgeIPTables = setup{primary: "bridge", backend: iptables}
	bridged        = setup{primary: "bridge", backend: "nftables", noBridgeNF: true}
	routed         = setup{primary: "ptp", backend: "nftables"}
	routedIPTables = setup{primary: "ptp", backend: iptables}
)

// setups are nftables on every topology, and iptables on every topology that it serves.
var setups = []setup{
	bridgeNFTables, bridged, routed, {primary: "calicolike", backend: "nftables"},
	bridgeIPTables, routedIPTables, {primary: "calicolike", backend: iptables},
}

// few are for tests of the proxy and the agent, which hardly depend on the topology and the
// backend: each of both once.
var few = []setup{bridged, routedIPTables}

// onEach runs the test on a node of its own for each setup, and onFew for each of few.
func onEach(t *testing.T, test func(t *testing.T, n *node)) { onThese(t, setups, test) }
func onFew(t *testing.T, test func(t *testing.T, n *node))  { onThese(t, few, test) }

func onThese(t *testing.T, setups []setup, test func(t *testing.T, n *node)) {
	t.Helper()
	t.Parallel()
	built, err := tools()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range setups {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			chain := s.chain
			if chain == nil {
				chain = []testbed.Entry{testbed.Kube2IAM(s.backend)}
			}
			b, err := testbed.New(t.Context(), testbed.Options{
				Tools: built, Primary: s.primary, Chain: chain, NoBridgeNF: s.noBridgeNF, IPv6: s.ipv6,
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if leaks := b.Leaks(); len(leaks) > 0 {
					t.Errorf("the metadata service was asked for credentials: %+v", leaks)
				}
				if err := b.Close(); err != nil {
					t.Error(err)
				}
			})
			b.PutRole("app", "")
			b.PutRole("other", "")
			test(t, &node{Bed: b, t: t, setup: s})
		})
	}
}

// proxy runs the proxy until the test ends, and shows its log where the test failed.
func (n *node) proxy(flags ...string) *testbed.Process {
	n.t.Helper()
	p, err := n.StartProxy(n.t.Context(), flags...)
	if p != nil {
		n.t.Cleanup(func() {
			if n.t.Failed() {
				n.t.Logf("the proxy's log:\n%s", p.Log())
			}
		})
	}
	n.must(err)
	return p
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// run is a running pod with this role, or without one where it is empty.
func (n *node) run(name, role string) *testbed.Sandbox {
	n.t.Helper()
	var annotations map[string]string
	if role != "" {
		annotations = map[string]string{roleKey: role}
	}
	s, err := n.RunPod(n.t.Context(), "default", name, annotations)
	n.must(err)
	return s
}

// answer is what a request brought: a status and a body, or an error of the connection.
type answer struct {
	status int
	body   string
	err    error
}

func (a answer) String() string {
	if a.err != nil {
		return a.err.Error()
	}
	return fmt.Sprintf("%d %q", a.status, a.body)
}

// refused tells that nobody answered: the connection was refused or reset.
func (a answer) refused() bool {
	return errors.Is(a.err, syscall.ECONNREFUSED) || errors.Is(a.err, syscall.ECONNRESET)
}

// get is a GET from the pod to the metadata service, with a header for each pair of the rest.
func (n *node) get(s *testbed.Sandbox, path string, header ...string) answer {
	return n.request(s, http.MethodGet, path, header...)
}

// getSoon is get for a pod that may get no answer at all, which is waited for twice as long as an
// SDK does.
func (n *node) getSoon(s *testbed.Sandbox, path string) answer {
	return n.requestWithin(2*time.Second, s, http.MethodGet, path)
}

func (n *node) request(s *testbed.Sandbox, method, path string, header ...string) answer {
	return n.requestWithin(10*time.Second, s, method, path, header...)
}

func (n *node) requestWithin(limit time.Duration, s *testbed.Sandbox, method, path string, header ...string) answer {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, metadata+path, nil)
	n.must(err)
	for pair := range slices.Chunk(header, 2) {
		req.Header.Set(pair[0], pair[1])
	}
	resp, err := s.Netns.HTTP().Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{status: resp.StatusCode, body: string(body), err: err}
}

// wantStatus makes a GET and wants this status.
func (n *node) wantStatus(s *testbed.Sandbox, path string, status int) {
	n.t.Helper()
	if got := n.get(s, path); got.err != nil || got.status != status {
		n.t.Errorf("%s asks for %s: %s, want %d", s.Name, path, got, status)
	}
}

// wantOwn wants the pod to get its own role's credentials: the stand-in STS issued them for this
// pod.
func (n *node) wantOwn(s *testbed.Sandbox, role string) {
	n.t.Helper()
	if got := n.get(s, credentials); got.status != http.StatusOK || got.body != role {
		n.t.Errorf("%s lists its roles: %s, want %s", s.Name, got, role)
		return
	}
	n.wantSession(s, role, n.get(s, credentials+role))
}

func (n *node) wantSession(s *testbed.Sandbox, role string, got answer) {
	n.t.Helper()
	var doc struct{ Code, AccessKeyID string }
	if got.status != http.StatusOK || json.Unmarshal([]byte(got.body), &doc) != nil || doc.Code != "Success" {
		n.t.Errorf("%s asks for %s: %s, want credentials", s.Name, role, got)
		return
	}
	name := s.Namespace + "." + s.Name
	for _, call := range n.STS.Calls() {
		if call.Issued == doc.AccessKeyID {
			if call.RoleARN != testbed.RoleBase+role || call.SessionName != name {
				n.t.Errorf("%s got credentials of %s for %s, want %s", s.Name, call.RoleARN, call.SessionName, role)
			}
			return
		}
	}
	n.t.Errorf("%s got %s, which STS did not issue", s.Name, doc.AccessKeyID)
}

// rules returns all rules of the node.
func (n *node) rules() string {
	n.t.Helper()
	var lines []string
	n.must(n.Node.Do(func() (err error) {
		lines, err = ruleset.All()
		return err
	}))
	return strings.Join(lines, "\n")
}

// records are the attachments on record, and the addresses that are held.
func (n *node) records() []string {
	n.t.Helper()
	list, err := attachment.In(n.StateDir).List()
	n.must(err)
	var all []string
	for _, r := range list {
		all = append(all, r.ID())
	}
	held, err := os.ReadDir(filepath.Join(n.StateDir, "by-ip"))
	if err != nil && !os.IsNotExist(err) {
		n.t.Fatal(err)
	}
	for _, e := range held {
		all = append(all, e.Name())
	}
	return all
}

// wantNoTrace wants neither rule nor record of the sandbox.
func (n *node) wantNoTrace(s *testbed.Sandbox) {
	n.t.Helper()
	if rules := n.rules(); strings.Contains(rules, s.IP.String()+"/") || strings.Contains(rules, s.IP.String()+" ") || strings.Contains(rules, s.ContainerID) {
		n.t.Errorf("a rule of %s is left:\n%s", s.Name, rules)
	}
	for _, r := range n.records() {
		if r == s.IP.String() || strings.HasPrefix(r, s.ContainerID) {
			n.t.Errorf("a record of %s is left: %s", s.Name, r)
		}
	}
}
