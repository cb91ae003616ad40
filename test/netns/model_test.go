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

	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

var (
	modelSteps = flag.Int("model.steps", 500, "steps of each sequence of TestModel")
	modelSeed  = flag.Uint64("model.seed", 1, "the seed of TestModel's sequences")
)

// model is what a node's history should have come to: which pods there are, what each may have, and whether anything may
// stand between a pod and that just now. Whatever happens, a pod gets its own role's credentials or none; while nothing
// stands between, it gets them.
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

// step is one thing that happens to the node. It returns what it did, or nothing where it could not happen now.
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

// TestModel takes a node through sequences of everything that happens to nodes, and asks for each pod after each step.
// A failure names the seed and the last steps: -model.seed and -model.steps repeat it.
func TestModel(t *testing.T) {
	onThese(t, []setup{setups[0], setups[2], setups[4], setups[8]}, func(t *testing.T, n *node) {
		for i := range 4 {
			n.PutRole(fmt.Sprintf("%s%d", modelRole, i), "")
		}
		seed := *modelSeed
		m := &model{node: n, rand: rand.New(rand.NewPCG(seed, uint64(len(n.String())))), pods: make(map[string]*modelPod), chain: n.SetChain()}
		n.SetChain(m.chain...)
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("seed %d; the last of %d steps:\n%s", seed, len(m.trace), strings.Join(m.trace[max(0, len(m.trace)-25):], "\n"))
			}
		})
		m.round() // the guard is there before any pod
		m.start()
		done := make(map[string]int)
		served := 0
		for len(m.trace) < *modelSteps && !t.Failed() {
			s := m.choose()
			if what := s.do(m); what != "" {
				done[s.name]++
				m.trace = append(m.trace, fmt.Sprintf("%d. %s: %s", len(m.trace)+1, s.name, what))
				served += m.check()
			}
		}
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

// pick is one of the pods for which want holds.
func (m *model) pick(want func(*modelPod) bool) *modelPod {
	names := slices.Sorted(maps.Keys(m.pods))
	names = slices.DeleteFunc(names, func(name string) bool { return !want(m.pods[name]) })
	if len(names) == 0 {
		return nil
	}
	return m.pods[names[m.rand.IntN(len(names))]]
}

func anyPod(*modelPod) bool { return true }

func (m *model) randomRole() string {
	if m.rand.IntN(5) == 0 {
		return ""
	}
	return fmt.Sprintf("%s%d", modelRole, m.rand.IntN(4))
}

// newPod is a pod that is bound to the node, with an address that nobody holds by now.
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

func (m *model) add() string {
	p := m.newPod()
	if p == nil {
		return ""
	}
	m.must(m.Add(m.t.Context(), p.Sandbox))
	p.attached = true
	m.running(p)
	return p.describe()
}

func (p *modelPod) describe() string { return fmt.Sprintf("%s, %s, role %q", p.Name, p.IP, p.role) }

// addUnchained is a pod whose ADD had no part of ours; what it asks is refused by the guard.
func (m *model) addUnchained() string {
	p := m.newPod()
	if p == nil {
		return ""
	}
	m.SetChain()
	m.must(m.Add(m.t.Context(), p.Sandbox))
	m.SetChain(m.chain...)
	p.attached, p.disturbed = true, "not adopted yet"
	m.running(p)
	return p.describe()
}

func (m *model) addAgain() string {
	p := m.pick(func(p *modelPod) bool { return p.Result != nil })
	if p == nil {
		return ""
	}
	m.must(m.AddAgain(m.t.Context(), p.Sandbox, p.Result))
	p.disturbed = ""
	return p.describe()
}

func (m *model) randomKill() kill {
	return kill{boundaries[m.rand.IntN(len(boundaries))], 1 + m.rand.IntN(8)}
}

// addKilled is an ADD that dies; the runtime's DEL comes later, or its ADD again, or the agent's round.
func (m *model) addKilled() string {
	p := m.newPod()
	if p == nil {
		return ""
	}
	m.SetChain()
	m.must(m.Add(m.t.Context(), p.Sandbox))
	m.SetChain(m.chain...)
	at := m.randomKill()
	p.attached, p.disturbed = true, "its ADD was killed"
	if !m.ours("ADD", p.Sandbox, at) {
		p.disturbed = ""
	}
	m.running(p)
	return p.describe() + " at " + at.String()
}

func (m *model) delKilled() string {
	p := m.pick(func(p *modelPod) bool { return p.attached })
	if p == nil {
		return ""
	}
	at := m.randomKill()
	m.ours("DEL", p.Sandbox, at)
	p.disturbed = "its DEL was killed, or was not"
	return p.describe() + " at " + at.String()
}

func (m *model) del() string {
	p := m.pick(anyPod)
	if p == nil {
		return ""
	}
	m.must(m.StopPod(m.t.Context(), p.Sandbox))
	delete(m.pods, p.Name)
	m.gone = append(m.gone, p.Sandbox)
	return p.describe()
}

// vanish is a pod whose sandbox dies and whom nobody mourns: no DEL comes.
func (m *model) vanish() string {
	p := m.pick(anyPod)
	if p == nil {
		return ""
	}
	m.must(p.Netns.Close())
	m.must(m.KubeAPI.DeletePod("default", p.Name))
	delete(m.pods, p.Name)
	m.gone = append(m.gone, p.Sandbox)
	return p.describe()
}

// lateDel is a DEL of our part for a pod that went before, which others may have succeeded.
func (m *model) lateDel() string {
	if len(m.gone) == 0 {
		return ""
	}
	s := m.gone[m.rand.IntN(len(m.gone))]
	m.must(m.delOurs(s))
	return s.Name
}

func (m *model) disturb(why string) {
	for _, p := range m.pods {
		p.disturbed = why
	}
}

func (m *model) flushNAT() string {
	m.flush()
	m.disturb("flushed")
	return "refused until a round"
}

func (m *model) flushEverything() string {
	m.flushAll()
	return m.agentRound()
}

// agentRound heals: every pod is served from then on.
func (m *model) agentRound() string {
	m.round()
	for _, p := range m.pods {
		p.disturbed = ""
	}
	return "healed"
}

func (m *model) gc() string {
	var valid []*testbed.Sandbox
	for _, p := range m.pods {
		valid = append(valid, p.Sandbox)
	}
	m.must(m.GC(m.t.Context(), valid...))
	return fmt.Sprint(len(valid), " are valid")
}

func (m *model) changeRole() string {
	p := m.pick(anyPod)
	if p == nil {
		return ""
	}
	before := p.role
	p.role = m.randomRole()
	m.must(m.KubeAPI.UpdatePod("default", p.Name, func(pod *corev1.Pod) { pod.Annotations = annotations(p.role) }))
	if m.proxy != nil && before != p.role {
		// Until the API has told the proxy, the pod has what it had.
		m.eventually(func() bool {
			got := m.get(p.Sandbox, credentials)
			return got.err != nil || got.status != 200 && p.role == "" || got.body == p.role || p.disturbed != "" && got.status != 200
		})
	}
	return fmt.Sprintf("%s has %q and not %q", p.Name, p.role, before)
}

func annotations(role string) map[string]string {
	if role == "" {
		return nil
	}
	return map[string]string{roleKey: role}
}

func (m *model) start() {
	p, err := m.StartProxy(m.t.Context(), append([]string{"--log-level", "warn"}, impatient...)...)
	m.must(err)
	m.proxy = p
}

func (m *model) restartProxy() string {
	if m.proxy == nil {
		return ""
	}
	how := "stopped"
	if m.rand.IntN(2) == 0 {
		how = "killed"
		m.proxy.Kill()
	} else {
		m.must(m.proxy.Stop())
	}
	m.start()
	return how
}

func (m *model) proxyDown() string {
	if m.proxy == nil {
		return ""
	}
	m.must(m.proxy.Stop())
	m.proxy = nil
	return "all are refused"
}

func (m *model) proxyUp() string {
	if m.proxy != nil {
		return ""
	}
	m.start()
	return "served again"
}

// forge is a pod that asks from an address that is a neighbour's.
func (m *model) forge() string {
	forger, victim := m.pick(anyPod), m.pick(anyPod)
	if forger == nil || forger == victim {
		return ""
	}
	m.address(forger.Sandbox, "add", victim.IP.String()+"/32")
	m.wantSilenceOrRefusal(forger.Sandbox, victim.IP)
	m.address(forger.Sandbox, "del", victim.IP.String()+"/32")
	if m.primary == "bridge" {
		m.recover() // the forger answered ARP for it
	}
	return fmt.Sprintf("%s as %s, which is %s's", forger.Name, victim.IP, victim.Name)
}

// reboot takes away all that lives in memory: sandboxes, rules, records. What libcni remembers stays on the disk.
func (m *model) reboot() string {
	if m.proxy != nil {
		m.proxy.Kill()
	}
	for _, p := range m.pods {
		m.must(p.Netns.Close())
		m.must(m.KubeAPI.DeletePod("default", p.Name))
		m.gone = append(m.gone, p.Sandbox)
	}
	clear(m.pods)
	m.flushAll()
	m.must(os.RemoveAll(m.StateDir))
	m.round()
	m.start()
	return "nothing is left but libcni's cache"
}
