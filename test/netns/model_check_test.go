package netns

import (
	"encoding/json"
	"net/netip"

	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

// check requests for each pod what it may have, and sometimes what it may not, and returns how
// many got their own. No pod may have received credentials of the real service.
func (m *model) check() (served int) {
	m.t.Helper()
	for _, p := range m.inOrder() {
		served += m.checkPod(p)
	}
	if leaks := m.Leaks(); len(leaks) > 0 {
		m.t.Errorf("after %s: the metadata service was asked for credentials: %+v", m.last(), leaks)
	}
	m.IMDS.Reset()
	return served
}

func (m *model) last() string {
	if len(m.trace) == 0 {
		return "nothing"
	}
	return m.trace[len(m.trace)-1]
}

func (m *model) checkPod(p *modelPod) (served int) {
	m.t.Helper()
	role := p.role
	if role == "" || m.rand.IntN(8) == 0 {
		role = modelRole + string('0'+rune(m.rand.IntN(4)))
	}
	ask := m.get
	if p.disturbed != "" {
		ask = func(s *testbed.Sandbox, path string, _ ...string) answer { return m.getSoon(s, path) }
	}
	got := ask(p.Sandbox, credentials+role)
	var doc struct{ Code, AccessKeyID string }
	has := got.err == nil && got.status == 200 && json.Unmarshal([]byte(got.body), &doc) == nil && doc.AccessKeyID != ""
	switch {
	case has && role != p.role:
		m.t.Errorf("after %s: %s has credentials of %s: %s", m.last(), p.describe(), role, got)
	case has:
		if call, ok := m.issued(doc.AccessKeyID); !ok || call.RoleARN != testbed.RoleBase+role || call.SessionName != "default."+p.Name {
			m.t.Errorf("after %s: %s has another's credentials: %+v", m.last(), p.describe(), call)
		}
		return 1
	case got.err == nil && got.status == 200:
		m.t.Errorf("after %s: %s has an answer that is no credentials: %s", m.last(), p.describe(), got)
	case m.proxy != nil && p.disturbed == "" && role == p.role:
		m.t.Errorf("after %s: %s is refused, and nothing stands between: %s", m.last(), p.describe(), got)
	}
	return 0
}

// issued returns the STS call that issued an access key.
func (m *model) issued(accessKeyID string) (sts.Call, bool) {
	calls := m.STS.Calls()
	for i := len(calls) - 1; i >= 0; i-- {
		if calls[i].Issued == accessKeyID {
			return calls[i], true
		}
	}
	return sts.Call{}, false
}
