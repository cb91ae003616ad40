package netns

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

var (
	modelSteps = flag.Int("model.steps", 500, "steps of each sequence of TestModel")
	modelSeed  = flag.Uint64("model.seed", 1, "the seed of TestModel's sequences")
)

// model is the expected state of a node: its pods, what each may have, and whether anything may
// stand between a pod and its credentials. A pod gets its own role's credentials or none; if
// nothing stands between, it gets them.
type model struct {
	*node
	rand  *rand.Rand
	pods  map[string]*modelPod
	gone  []*testbed.Sandbox // whose DEL may come late, or again
	made  int
	chain []testbed.Entry
	proxy *testbed.Process // nil while it is down
	trace []string
}

type modelPod struct {
	*testbed.Sandbox
	role string // empty for none
	// disturbed says what keeps the pod from its credentials, perhaps; empty for nothing.
	disturbed string
	// attached says that the runtime has seen an ADD of the whole chain succeed.
	attached bool
}

const (
	mostPods  = 12
	modelIPs  = 14 // so few that each is soon another pod's
	modelRole = "model"
)

// step is one event on the node. do describes what it did, or returns "" if it is impossible
// now.
type step struct {
	weight int
	name   string
	do     func(*model) string
}

var steps = []step{
	{24, "ADD", (*model).add},
	{14, "DEL", (*model).del},
	{6, "a pod ends without a DEL", (*model).vanish},
	{8, "ADD is killed", (*model).addKilled},
	{6, "DEL is killed", (*model).delKilled},
	{4, "a second ADD", (*model).addAgain},
	{6, "a late DEL", (*model).lateDel},
	{6, "nat is flushed", (*model).flushNAT},
	{3, "everything is flushed, and the agent's round comes", (*model).flushEverything},
	{10, "the agent's round", (*model).agentRound},
	{6, "another role", (*model).changeRole},
	{4, "the proxy restarts", (*model).restartProxy},
	{2, "the proxy goes down", (*model).proxyDown},
	{30, "the proxy comes up", (*model).proxyUp},
	{5, "a pod forges its neighbour's address", (*model).forge},
	{3, "a pod comes before the plugin is chained", (*model).addUnchained},
	{2, "GC", (*model).gc},
	{1, "reboot", (*model).reboot},
}

// TestModel runs random sequences of events on a node and requests credentials for each pod
// after each event. A failure names the seed and the last steps, which -model.seed and
// -model.steps repeat.
func TestModel(t *testing.T) {
	onThese(t, []setup{bridgeIPTables, bridgeNFTables, bridged, routedIPTables, routed}, func(t *testing.T, n *node) {
		m := newModel(n, *modelSeed)
		done, served := m.walk(*modelSteps)
		for _, s := range steps {
			if done[s.name] == 0 && *modelSteps >= 500 {
				t.Errorf("in %d steps this never happened: %s", *modelSteps, s.name)
			}
		}
		t.Logf("%d steps, %d answers with a pod's own credentials; %v", len(m.trace), served, done)
		if served < len(m.trace) {
			t.Error("pods were hardly ever served")
		}
	})
}

// TestModelIsReproducible: a seed always gives the same sequence.
func TestModelIsReproducible(t *testing.T) {
	var traces [2][]string
	t.Run("twice", func(t *testing.T) {
		for i := range traces {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				onThese(t, []setup{routed}, func(_ *testing.T, n *node) {
					m := newModel(n, 7)
					m.walk(60)
					traces[i] = m.trace
				})
			})
		}
	})
	if diff := cmp.Diff(traces[0], traces[1]); diff != "" {
		t.Error(diff)
	}
}

func newModel(n *node, seed uint64) *model {
	for i := range 4 {
		n.PutRole(fmt.Sprintf("%s%d", modelRole, i), "")
	}
	m := &model{node: n, rand: rand.New(rand.NewPCG(seed, uint64(len(n.String())))), pods: make(map[string]*modelPod), chain: n.SetChain()}
	n.SetChain(m.chain...)
	n.t.Cleanup(func() {
		if n.t.Failed() {
			n.t.Logf("seed %d; the last of %d steps:\n%s", seed, len(m.trace), strings.Join(m.trace[max(0, len(m.trace)-25):], "\n"))
		}
	})
	m.round() // the guard is there before any pod
	m.start()
	return m
}

// walk runs a sequence until its end or an error. It returns how often each step was done, and
// how many answers had a pod's own credentials.
func (m *model) walk(length int) (done map[string]int, served int) {
	done = make(map[string]int)
	for len(m.trace) < length && !m.t.Failed() {
		s := m.choose()
		if what := s.do(m); what != "" {
			done[s.name]++
			m.trace = append(m.trace, fmt.Sprintf("%d. %s: %s", len(m.trace)+1, s.name, what))
			served += m.check()
		}
	}
	return done, served
}

func (m *model) choose() step {
	total := 0
	for _, s := range steps {
		total += s.weight
	}
	at := m.rand.IntN(total)
	for _, s := range steps {
		if at -= s.weight; at < 0 {
			return s
		}
	}
	panic("unreachable")
}

// inOrder returns the pods sorted by name, so a seed always gives the same draws.
func (m *model) inOrder() []*modelPod {
	var pods []*modelPod
	for _, name := range slices.Sorted(maps.Keys(m.pods)) {
		pods = append(pods, m.pods[name])
	}
	return pods
}

// pick returns a random pod for which want holds, or nil.
func (m *model) pick(want func(*modelPod) bool) *modelPod {
	pods := slices.DeleteFunc(m.inOrder(), func(p *modelPod) bool { return !want(p) })
	if len(pods) == 0 {
		return nil
	}
	return pods[m.rand.IntN(len(pods))]
}

func anyPod(*modelPod) bool { return true }

func (m *model) randomRole() string {
	if m.rand.IntN(5) == 0 {
		return ""
	}
	return fmt.Sprintf("%s%d", modelRole, m.rand.IntN(4))
}

// newPod returns a pod that is bound to the node and has a free address, or nil if there are
// enough pods.
func (m *model) newPod() *modelPod {
	if len(m.pods) >= mostPods {
		return nil
	}
	m.made++
	role := m.randomRole()
	p := &modelPod{Sandbox: m.pending(fmt.Sprintf("pod%d", m.made), role), role: role}
	held := make(map[string]bool)
	for _, other := range m.pods {
		held[other.IP.String()] = true
	}
	var free []string
	for i := range modelIPs {
		if ip := fmt.Sprintf("10.201.0.%d", 10+i); !held[ip] {
			free = append(free, ip)
		}
	}
	ip := free[m.rand.IntN(len(free))]
	os.Remove(m.ipamFile(ip)) // what a pod without a DEL left
	p.IP = mustAddr(ip)
	m.pods[p.Name] = p
	return p
}

func (m *model) ipamFile(ip string) string {
	return filepath.Join(m.Dir, "ipam", testbed.Network, ip)
}

func (m *model) running(p *modelPod) {
	m.must(m.KubeAPI.SetStatus("default", p.Name, corev1.PodRunning, p.IP.String()))
}
