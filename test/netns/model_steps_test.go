package netns

import (
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

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

// addUnchained adds a pod without the plugin. The guard refuses its requests.
func (m *model) addUnchained() string {
	p := m.newPod()
	if p == nil {
		return ""
	}
	m.addPrimary(p)
	p.attached, p.disturbed = true, "not adopted yet"
	m.running(p)
	return p.describe()
}

// addPrimary runs ADD of the primary plugin alone.
func (m *model) addPrimary(p *modelPod) {
	m.SetChain()
	m.must(m.Add(m.t.Context(), p.Sandbox))
	m.SetChain(m.chain...)
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
	return kill{killPoints[m.rand.IntN(len(killPoints))], 1 + m.rand.IntN(8)}
}

// addKilled kills an ADD. A later step repeats it, runs DEL, or runs a round.
func (m *model) addKilled() string {
	p := m.newPod()
	if p == nil {
		return ""
	}
	m.addPrimary(p)
	at := m.randomKill()
	p.attached, p.disturbed = true, "its ADD was killed"
	if !m.runPlugin("ADD", p.Sandbox, at) {
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
	m.runPlugin("DEL", p.Sandbox, at)
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

// vanish ends a pod's sandbox without a DEL.
func (m *model) vanish() string {
	p := m.pick(anyPod)
	if p == nil {
		return ""
	}
	m.end(p)
	m.must(m.KubeAPI.DeletePod("default", p.Name))
	delete(m.pods, p.Name)
	m.gone = append(m.gone, p.Sandbox)
	return p.describe()
}

// end ends a sandbox without a DEL and waits until its interface is gone: ptp would take the
// route of the old interface for that of the address's next holder.
func (m *model) end(p *modelPod) {
	var veth string
	if p.Result != nil {
		veth = m.hostLink(p.Sandbox)
	}
	m.must(p.Netns.Close())
	m.eventually(func() bool {
		gone := true
		m.must(m.Node.Do(func() error {
			_, err := netlink.LinkByName(veth)
			gone = err != nil
			return nil
		}))
		return gone
	})
}

// lateDel runs the plugin's DEL for a pod that is gone; its address may have another holder.
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

// agentRound runs a round, after which every pod is served.
func (m *model) agentRound() string {
	m.round()
	for _, p := range m.pods {
		p.disturbed = ""
	}
	return "healed"
}

func (m *model) gc() string {
	var valid []*testbed.Sandbox
	for _, p := range m.inOrder() {
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

// forge sends a pod's request from a neighbour's address.
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

// reboot removes what is in memory: sandboxes, rules and records. libcni's cache stays.
func (m *model) reboot() string {
	if m.proxy != nil {
		m.proxy.Kill()
	}
	for _, p := range m.inOrder() {
		m.end(p)
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
