package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// successor is a proxy that takes over from the one that serves.
type successor struct {
	*handover.Takeover
	components *components
	got        chan map[string]*handover.Listener
	done       chan error
	end        func()
}

func startSuccessor(t *testing.T, dir string, app, admin uint16, client kubeAPI, sts credentials.Assumer) *successor {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	o := &options{node: "node-1", stateDir: dir, appPort: app, metricsPort: admin, rules: roles.Rules{RoleKey: roleKey, BaseARN: "arn:aws:iam::123456789012:role/", Duration: time.Hour,
		Restriction: &roles.Restriction{Key: "allowed", Format: roles.Glob}}}
	p := newComponents(o, client, sts, attachment.NewIndex(attachment.In(dir)), log)
	s := &successor{Takeover: newTakeover(o, p, log), components: p, got: make(chan map[string]*handover.Listener, 1), done: make(chan error, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	s.Begin(ctx)
	go func() {
		s.done <- p.run(ctx, func(ctx context.Context) error {
			sockets, err := s.Listen(ctx)
			if err != nil || sockets == nil {
				return err
			}
			defer func() {
				for _, l := range sockets {
					l.Close()
				}
			}()
			for _, l := range sockets {
				go func() {
					for c, err := l.Accept(); err == nil; c, err = l.Accept() {
						c.Close()
					}
				}()
			}
			s.got <- sockets
			return s.Serve(ctx, sockets)
		})
	}()
	ended := false
	s.end = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-s.done; err != nil {
			t.Error(err)
		}
		s.Takeover.Close()
	}
	t.Cleanup(s.end)
	return s
}

func (s *successor) waitUntilServing(t *testing.T) {
	t.Helper()
	select {
	case <-s.got:
	case <-time.After(10 * time.Second):
		t.Fatal("the proxy does not serve")
	}
}

// waitForHandoverSocket waits until the proxy itself answers successors.
func waitForHandoverSocket(t *testing.T, s *successor) {
	t.Helper()
	eventually(t, "handover socket", func() bool {
		p, err := handover.Dial(t.Context(), s.Path)
		return err == nil && p != nil && p.Close() == nil
	})
}

func (s *successor) mustNotServe(t *testing.T) {
	t.Helper()
	select {
	case <-s.got:
		t.Error("the proxy serves without waiting")
	case <-time.After(500 * time.Millisecond):
	}
}

func oneRunningPod() fakeAPI {
	return fakeAPI{fake.NewClientset(runningPod("pod", "reader", "10.0.0.1"))}
}

// runningPod returns a pod of the node, without an annotation if role is empty.
func runningPod(name, role, ip string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("uid-" + name)},
		Spec: corev1.PodSpec{NodeName: "node-1"}, Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip}}
	if role != "" {
		p.Annotations = map[string]string{roleKey: role}
	}
	return p
}

// shown is an API server with a pod whose namespace allows all roles. It reports the namespace once
// shows is closed.
type shown struct {
	fakeAPI
	shows chan struct{}
}

func (u shown) FollowNamespace(ctx context.Context, _ string, report func(map[string]string, bool)) error {
	select {
	case <-u.shows:
		report(map[string]string{"allowed": `["*"]`}, true)
	case <-ctx.Done():
	}
	<-ctx.Done()
	return nil
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: never", what)
		}
	}
}

// isHandedOver reports whether the process sends its clients to a successor.
func isHandedOver(of *handover.Takeover) bool {
	w := httptest.NewRecorder()
	of.CloseConnections(http.NotFoundHandler()).ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	return w.Header().Get("Connection") == "close"
}

func TestSuccessorWaitsForPods(t *testing.T) {
	dir, app, admin := shortDir(t), free(t), free(t)
	open := make(chan struct{})
	close(open)
	first := startSuccessor(t, dir, app, admin, shown{oneRunningPod(), open}, new(countingSTS))
	first.waitUntilServing(t)
	eventually(t, "credentials", func() bool {
		return first.components.cache.Stats().Holders == 1 && first.components.cache.Stats().Pending == 0
	})
	waitForHandoverSocket(t, first)
	shows := make(chan struct{})
	sts := new(countingSTS)
	second := startSuccessor(t, dir, app, admin, shown{oneRunningPod(), shows}, sts)
	second.mustNotServe(t)
	if isHandedOver(first.Takeover) {
		t.Error("clients are told to dial again before a successor has taken over")
	}
	close(shows)
	second.waitUntilServing(t)
	eventually(t, "handed over", func() bool { return isHandedOver(first.Takeover) })
	if isHandedOver(second.Takeover) {
		t.Error("the successor sends clients away")
	}
	if n := sts.calls.Load(); n != 0 {
		t.Errorf("STS was asked %d times", n)
	}
	first.end()

	// With another app port, the proxy still takes over. When its predecessor ends, it serves
	// although its namespaces are unknown.
	waitForHandoverSocket(t, second)
	third := startSuccessor(t, dir, free(t), admin, shown{oneRunningPod(), make(chan struct{})}, new(countingSTS))
	third.mustNotServe(t)
	second.end()
	third.waitUntilServing(t)
}

func TestSuccessorWaitsForCredentials(t *testing.T) {
	dir, app, admin := shortDir(t), free(t), free(t)
	open := make(chan struct{})
	close(open)
	first := startSuccessor(t, dir, app, admin, fakeAPI{fake.NewClientset()}, new(countingSTS)) // knows no pod
	first.waitUntilServing(t)
	waitForHandoverSocket(t, first)
	second := startSuccessor(t, dir, app, admin, shown{oneRunningPod(), open}, slowSTS{})
	second.mustNotServe(t)
	second.waitUntilServing(t)
	if second.components.cache.Stats().Pending != 0 {
		t.Error("the proxy serves without its pods' credentials")
	}
}

func TestSuccessorOnOtherPorts(t *testing.T) {
	dir, app, admin := shortDir(t), free(t), free(t)
	open := make(chan struct{})
	close(open)
	first := startSuccessor(t, dir, app, admin, shown{oneRunningPod(), open}, new(countingSTS))
	first.waitUntilServing(t)
	waitForHandoverSocket(t, first)
	other := free(t)
	second := startSuccessor(t, dir, other, free(t), shown{oneRunningPod(), open}, new(countingSTS))
	select {
	case sockets := <-second.got:
		if got := sockets[podSocket(other).Name].Addr().(*net.TCPAddr).Port; got != int(other) {
			t.Errorf("port %d and not %d", got, other)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the proxy does not serve")
	}
	if c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", fmt.Sprint(app))); err != nil {
		t.Error(err) // the first proxy still serves
	} else {
		c.Close()
	}
}
