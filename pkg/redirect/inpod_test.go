package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

const ipInPod = `table ip kube2iam-cni {
	set metadata {
		type ipv4_addr . inet_service
		elements = {
			169.254.169.254 . 80 comment "kube2iam-cni"
		}
	}

	map own {
		type ipv4_addr : ipv4_addr . inet_service
OWN	}

	chain redirections {
		type nat hook output priority -110; policy accept;
		ip daddr . tcp dport @metadata dnat ip to ip saddr map @own comment "in the pod"
	}
}
`

func inPodGolden(own ...string) string { return strings.Replace(ipInPod, "OWN", elements(own...), 1) }

// pod is another namespace, in which commands are run, with the path to it.
type pod struct {
	*namespace
	path      string
	host, own netns.NsHandle
}

func (n *namespace) newPod() *pod {
	n.Helper()
	host, err := netns.Get()
	n.must(err)
	own, err := netns.New()
	n.must(err)
	n.must(netns.Set(host))
	n.Cleanup(func() { host.Close(); own.Close() })
	return &pod{n, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(own)), host, own}
}

// in does something in the pod's namespace.
func (p *pod) in(do func()) {
	p.Helper()
	p.must(netns.Set(p.own))
	defer func() { p.must(netns.Set(p.host)) }()
	do()
}

// transactions asserts how many changes of the pod's nftables something takes.
func (p *pod) transactions(what string, want uint32, do func()) {
	p.Helper()
	p.in(func() {
		p.namespace.transactions(what, want, func() {
			p.must(netns.Set(p.host))
			do()
			p.must(netns.Set(p.own))
		})
	})
}

func (p *pod) want(when, want string) {
	p.Helper()
	p.in(func() { p.wantRuleset(when+", in the pod", want) })
	p.wantRuleset(when+", on the host", "")
}

func (p *pod) attachment(sources ...string) Attachment {
	a := routed("c1@eth0", "", sources...)
	a.Netns = p.path
	return a
}

func TestAddInPod(t *testing.T) {
	const own = `10.1.0.5 comment "c1@eth0" : 192.168.7.2 . 8181`
	for name, tc := range map[string]struct {
		sources []string
		want    string
	}{
		"IPv4":          {[]string{"10.1.0.5"}, inPodGolden(own)},
		"IPv6":          {[]string{"fd00:1::5"}, inIPv6(inPodGolden(own))},
		"dual stack":    {[]string{"10.1.0.5", "fd00:1::5"}, golden(inPodGolden(own), inIPv6(inPodGolden(own)))},
		"two addresses": {[]string{"10.1.0.5", "10.1.0.6"}, inPodGolden(own, strings.Replace(own, "0.5", "0.6", 1))},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNamespace(t)
			p := n.newPod()
			a := p.attachment(tc.sources...)
			p.transactions("ADD", 1, func() { n.must(n.AddInPod(a)) })
			p.want("after ADD", tc.want)
			p.transactions("the same ADD", 0, func() { n.must(n.AddInPod(a)) })
			p.want("after the same ADD", tc.want)
			missing, err := n.MissingInPod(a)
			n.must(err)
			if len(missing) > 0 {
				t.Errorf("missing: %v", missing)
			}
			bare := p.bare(a)
			p.transactions("DEL", 1, func() { n.must(n.Remove(NFTables, a)) })
			p.want("after DEL", bare)
			n.must(n.Remove(NFTables, a))
			p.want("after a second DEL", bare)
		})
	}
}

// bare is what stands for an attachment, without its elements.
func (p *pod) bare(a Attachment) string {
	var tables []string
	for _, m := range a.services() {
		if m.Addr().Is6() {
			tables = append(tables, inIPv6(inPodGolden()))
		} else {
			tables = append(tables, inPodGolden())
		}
	}
	return golden(tables...)
}

// TestAddInPodReplaces has an attachment added again with another proxy and one address less.
func TestAddInPodReplaces(t *testing.T) {
	n := newNamespace(t)
	p := n.newPod()
	n.must(n.AddInPod(p.attachment("10.1.0.5", "10.1.0.6")))
	again := p.attachment("10.1.0.5")
	again.Redirections[0].Proxy = netip.MustParseAddrPort("192.168.7.3:9999")
	n.must(n.AddInPod(again))
	p.want("after the second ADD", inPodGolden(`10.1.0.5 comment "c1@eth0" : 192.168.7.3 . 9999`))
}

// TestTwoInterfacesInOnePod share the pod's tables.
func TestTwoInterfacesInOnePod(t *testing.T) {
	n := newNamespace(t)
	p := n.newPod()
	first, second := p.attachment("10.1.0.5"), p.attachment("10.2.0.5")
	second.ID = "c1@net1"
	n.must(n.AddInPod(first))
	n.must(n.AddInPod(second))
	n.must(n.Remove(NFTables, first))
	p.want("after the first's DEL", inPodGolden(`10.2.0.5 comment "c1@net1" : 192.168.7.2 . 8181`))
}

func TestMissingInPod(t *testing.T) {
	const redirection = "redirection of c1@eth0 from 10.1.0.5 to 192.168.7.2:8181 in own of table ip kube2iam-cni"
	for name, tc := range map[string]struct {
		break_ string
		want   []string
	}{
		"nothing":         {"list ruleset", nil},
		"the rule":        {"flush chain ip kube2iam-cni redirections", []string{"redirections in table ip kube2iam-cni"}},
		"the redirection": {"flush map ip kube2iam-cni own", []string{redirection}},
		"the service": {"flush set ip kube2iam-cni metadata",
			[]string{"entry of kube2iam-cni from 169.254.169.254 in metadata of table ip kube2iam-cni"}},
		"everything": {"flush ruleset", []string{"redirections in table ip kube2iam-cni",
			"entry of kube2iam-cni from 169.254.169.254 in metadata of table ip kube2iam-cni", redirection}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNamespace(t)
			p := n.newPod()
			a := p.attachment("10.1.0.5")
			n.must(n.AddInPod(a))
			var before string
			p.in(func() { n.run("nft " + tc.break_); before = n.ruleset() })
			missing, err := n.MissingInPod(a)
			n.must(err)
			if got, want := strings.Join(missing, "\n"), strings.Join(tc.want, "\n"); got != want {
				t.Errorf("got %q, want %q", missing, tc.want)
			}
			p.want("after asking", before)
			n.must(n.AddInPod(a))
			p.want("after one more ADD", inPodGolden(`10.1.0.5 comment "c1@eth0" : 192.168.7.2 . 8181`))
		})
	}
}

// TestPodIsGone has the pod's namespace die before its DEL: what was in it is gone, too.
func TestPodIsGone(t *testing.T) {
	n := newNamespace(t)
	file := filepath.Join(t.TempDir(), "netns")
	n.must(os.WriteFile(file, nil, 0o444))
	dead := exec.Command("true")
	n.must(dead.Run())
	for name, path := range map[string]string{
		"no such file":                           filepath.Join(t.TempDir(), "none"),
		"a file that a namespace was mounted on": file,
		"a process that is dead":                 fmt.Sprintf("/proc/%d/ns/net", dead.Process.Pid),
		"a descriptor that is closed":            fmt.Sprintf("/proc/%d/fd/999999", os.Getpid()),
	} {
		a := routed("c1@eth0", "", "10.1.0.5")
		a.Netns = path
		if err := n.Remove(NFTables, a); err != nil {
			t.Errorf("%s: DEL: %v", name, err)
		}
		if err := n.AddInPod(a); err == nil {
			t.Errorf("%s: ADD: no error", name)
		}
		if missing, err := n.MissingInPod(a); err == nil {
			t.Errorf("%s: got %v and no error", name, missing)
		}
		n.wantRuleset(name+", on the host", "")
	}
}

// TestAddInPodThatIsGone is no fault of the kernel's.
func TestAddInPodThatIsGone(t *testing.T) {
	n := newNamespace(t)
	a := routed("c1@eth0", "", "10.1.0.5")
	a.Netns = filepath.Join(t.TempDir(), "none")
	if err := n.AddInPod(a); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrUnsupported) {
		t.Errorf("got %v", err)
	}
}

// TestModulesAreLoadedInPods is a pod whose namespace takes too long once, as where the kernel loads modules for it: the same is
// done in a namespace of ours without a bound, and then in the pod again. One that always takes too long is given up.
func TestModulesAreLoadedInPods(t *testing.T) {
	n := newNamespace(t)
	p := n.newPod()
	a := p.attachment("10.1.0.5")
	for name, tc := range map[string]struct{ slow, calls int }{"in time": {0, 1}, "once": {1, 3}, "always": {9, 3}} {
		calls := 0
		err := n.within(a, func(in *inPod) error {
			calls++
			if calls == 2 {
				if in.netns != "" || in.options != nil {
					t.Errorf("%s: the second call is in %q", name, in.netns)
				}
				own, err := netns.Get()
				n.must(err)
				defer own.Close()
				if own.Equal(p.host) || own.Equal(p.own) {
					t.Errorf("%s: the second call is in the host's or the pod's namespace", name)
				}
				return in.replace(in.tables(podBase(a)), in.elements(podBase(a), a), a.ID)
			}
			if in.netns != a.Netns {
				t.Errorf("%s: call %d is in %q", name, calls, in.netns)
			}
			if calls <= tc.slow || tc.slow > 1 {
				return fmt.Errorf("reading: %w", os.ErrDeadlineExceeded)
			}
			return nil
		})
		if calls != tc.calls || (err != nil) != (tc.slow > 1) {
			t.Errorf("%s: %d calls, %v", name, calls, err)
		}
	}
	n.wantRuleset("on the host", "")
}

// TestEachStepInAPodHasItsTime holds that the time of one step is no other's: a step begins with all of it.
func TestEachStepInAPodHasItsTime(t *testing.T) {
	n := newNamespace(t)
	p := n.newPod()
	k := &nft{netns: p.path}
	defer k.close()
	_, err := k.read(nil)
	n.must(err)
	n.must(k.socket.SetReadDeadline(time.Now())) // a step that took all its time
	_, err = k.read(nil)
	n.must(err)
	n.must(k.socket.SetReadDeadline(time.Now()))
	a := p.attachment("10.1.0.5")
	in := &inPod{k}
	n.must(k.apply(in.tables(podBase(a)), nil, nil, in.elements(podBase(a), a)))
	p.want("after both", inPodGolden(`10.1.0.5 comment "c1@eth0" : 192.168.7.2 . 8181`))
}

// TestGuardAlone makes the guard of a node whose pods are redirected inside, next to what stands.
func TestGuardAlone(t *testing.T) {
	n := newNamespace(t, both...)
	n.must(n.Guard(Base{}))
	n.wantRuleset("no guard", "")
	base := Base{Guard: true, Guarded: guarded4.Guarded}
	missing, err := n.MissingGuard(base)
	n.must(err)
	if len(missing) != 6 {
		t.Errorf("missing %q", missing)
	}
	for _, first := range []func(){
		func() {},
		func() {
			n.must(n.nftables().Add(t.Context(), baseDual, routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")))
		},
	} {
		first()
		before := n.ruleset()
		n.must(n.Guard(base))
		if missing, err := n.MissingGuard(base); err != nil || missing != nil {
			t.Errorf("missing %q, %v", missing, err)
		}
		if strings.Contains(before, "routed") {
			n.wantRuleset("next to a pod", before)
		} else {
			guard := "table ip kube2iam-cni {\n" + strings.TrimSuffix(ipAddresses, "\n") + ipGuard + "}\n"
			n.wantRuleset("alone", golden(guard, inIPv6(guard)))
		}
	}
}
