package rules

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

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// podNetns is another network namespace than the host's, with the path to it.
type podNetns struct {
	*host
	path         string
	hostNS, podN netns.NsHandle
}

func (h *host) newPod() *podNetns {
	h.Helper()
	hostNS, err := netns.Get()
	h.must(err)
	pod, err := netns.New()
	h.must(err)
	h.must(netns.Set(hostNS))
	h.Cleanup(func() { hostNS.Close(); pod.Close() })
	return &podNetns{h, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(pod)), hostNS, pod}
}

// in calls do in the pod's namespace.
func (p *podNetns) in(do func()) {
	p.Helper()
	p.must(netns.Set(p.podN))
	defer func() { p.must(netns.Set(p.hostNS)) }()
	do()
}

func (p *podNetns) record(ips ...string) *attachment.Record {
	r := record("c1", attachment.DatapathPod, "", ips...)
	r.Netns = p.path
	return r
}

// want asserts the redirections inside the pod, as "source proxy", and that the host has none.
func (p *podNetns) want(when string, want ...string) {
	p.Helper()
	p.in(func() {
		got := elementsOnly(p.ruleset())
		for _, w := range want {
			if !strings.Contains(got, w) {
				p.Errorf("%s: no %s in the pod's\n%s", when, w, got)
			}
		}
		if n := strings.Count(got, "\n"); n != len(want) {
			p.Errorf("%s: %d redirections in the pod, want %d:\n%s", when, n, len(want), got)
		}
	})
	p.wantRuleset(when+", on the host", "")
}

const (
	redirect5   = `10.1.0.5 comment "c1@eth0" : 192.168.7.2 . 8181`
	redirect6   = `10.1.0.6 comment "c1@eth0" : 192.168.7.2 . 8181`
	redirectV65 = `fd00:1::5 comment "c1@eth0" : fd00:7::2 . 8181`
)

func TestAttachPod(t *testing.T) {
	for name, tc := range map[string]struct{ ips, want []string }{
		"IPv4":          {[]string{"10.1.0.5"}, []string{redirect5}},
		"IPv6":          {[]string{"fd00:1::5"}, []string{redirectV65}},
		"dual stack":    {[]string{"10.1.0.5", "fd00:1::5"}, []string{redirect5, redirectV65}},
		"two addresses": {[]string{"10.1.0.5", "10.1.0.6"}, []string{redirect5, redirect6}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newHost(t).newPod()
			r := p.record(tc.ips...)
			p.must(p.AttachPod(t.Context(), r))
			p.want("after ADD", tc.want...)
			var before uint32
			p.in(func() { before = p.generation() })
			p.must(p.AttachPod(t.Context(), r))
			p.in(func() {
				if after := p.generation(); after != before {
					t.Errorf("the same ADD made %d transactions", after-before)
				}
			})
			if changes, err := p.CheckPod(t.Context(), r); err != nil || len(changes) > 0 {
				t.Errorf("Check: %v, %v", changes, err)
			}
			p.must(p.DetachPod(t.Context(), r))
			p.want("after DEL")
			p.must(p.DetachPod(t.Context(), r))
		})
	}
}

func TestAttachPodReplaces(t *testing.T) {
	p := newHost(t).newPod()
	p.must(p.AttachPod(t.Context(), p.record("10.1.0.5")))
	again := p.record("10.1.0.5")
	again.Redirects[0].Proxy = netip.MustParseAddrPort("192.168.7.3:9999")
	p.must(p.AttachPod(t.Context(), again))
	p.want("after the second ADD", `10.1.0.5 comment "c1@eth0" : 192.168.7.3 . 9999`)
}

func TestTwoInterfacesInOnePod(t *testing.T) {
	p := newHost(t).newPod()
	first, second := p.record("10.1.0.5"), p.record("10.2.0.5")
	second.ContainerID = "c2"
	p.must(p.AttachPod(t.Context(), first))
	p.must(p.AttachPod(t.Context(), second))
	p.must(p.DetachPod(t.Context(), first))
	p.want("after the first DEL", `10.2.0.5 comment "c2@eth0" : 192.168.7.2 . 8181`)
}

func TestCheckPod(t *testing.T) {
	for name, tc := range map[string]struct {
		damage string
		want   int
	}{
		"nothing":         {"list ruleset", 0},
		"the rule":        {"flush chain ip kube2iam-cni redirections", 1},
		"the redirection": {"flush map ip kube2iam-cni pod", 1},
		"the service":     {"flush set ip kube2iam-cni metadata", 1},
		"everything":      {"flush ruleset", 3},
	} {
		t.Run(name, func(t *testing.T) {
			p := newHost(t).newPod()
			r := p.record("10.1.0.5")
			p.must(p.AttachPod(t.Context(), r))
			p.in(func() { p.run("nft " + tc.damage) })
			changes, err := p.CheckPod(t.Context(), r)
			p.must(err)
			if len(changes) != tc.want {
				t.Errorf("%d changes, want %d: %v", len(changes), tc.want, changes)
			}
			p.must(p.AttachPod(t.Context(), r))
			p.want("after one more ADD", redirect5)
		})
	}
}

// TestPodIsGone has the pod's namespace end before its DEL. The error is not one of the kernel's
// lacks.
func TestPodIsGone(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(t.TempDir(), "netns")
	h.must(os.WriteFile(file, nil, 0o444))
	dead := exec.Command("true")
	h.must(dead.Run())
	for name, path := range map[string]string{
		"no such file": filepath.Join(t.TempDir(), "none"),
		"a file on which a namespace was mounted":  file,
		"a process that has ended":                 fmt.Sprintf("/proc/%d/ns/net", dead.Process.Pid),
		"a file descriptor that is closed":         fmt.Sprintf("/proc/%d/fd/999999", os.Getpid()),
		"the host's namespace (its PID is reused)": "/proc/thread-self/ns/net",
	} {
		r := record("c1", attachment.DatapathPod, "", "10.1.0.5")
		r.Netns = path
		if err := h.AttachPod(t.Context(), r); err == nil || errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: ADD: %v", name, err)
		}
		if changes, err := h.CheckPod(t.Context(), r); err == nil {
			t.Errorf("%s: Check: %v and no error", name, changes)
		}
		h.DetachPod(t.Context(), r)
		h.wantRuleset(name+", on the host", "")
	}
	r := record("c1", attachment.DatapathPod, "", "10.1.0.5")
	r.Netns = filepath.Join(t.TempDir(), "none")
	if err := h.AttachPod(t.Context(), r); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no such file: %v", err)
	}
	r.Netns = "/proc/thread-self/ns/net"
	if err := h.AttachPod(t.Context(), r); !errors.Is(err, ErrHostNetns) {
		t.Errorf("the host's namespace: %v", err)
	}
}

// TestSlowPod has a pod whose namespace holds more elements than can be read in time. ADD fails
// within its bound, and the host's rules are not concerned.
func TestSlowPod(t *testing.T) {
	p := newHost(t).newPod()
	conn, err := nft.Open(nft.InNetns(p.podN, time.Nanosecond))
	p.must(err)
	defer conn.Close()
	if _, err := conn.Apply(t.Context(), podRedirection(p.record("10.1.0.5")), nil, false); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want %v", err, os.ErrDeadlineExceeded)
	}
	p.want("after it")
}

// TestModulesAreLoadedOutsideThePod calls do in a namespace that is neither the host's nor the
// pod's.
func TestModulesAreLoadedOutsideThePod(t *testing.T) {
	p := newHost(t).newPod()
	p.must(inNewNetns(func() error {
		here, err := netns.Get()
		if err != nil {
			return err
		}
		defer here.Close()
		if here.Equal(p.hostNS) || here.Equal(p.podN) {
			return errors.New("it is the host's or the pod's namespace")
		}
		conn, err := nft.Open()
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Apply(t.Context(), podRedirection(p.record("10.1.0.5")), nil, false)
		return err
	}))
	p.want("after it")
}
