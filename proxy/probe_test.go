package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/unixsocket"
)

// shortDir is a state directory with the proxy's in it. Its path leaves room for the name of a unix
// socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "state")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := makeProxyDir(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// answersProbes has a proxy answer probes at a socket until end is called or the test is over.
func answersProbes(t *testing.T, socket string, h http.Handler) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { serveProbes(ctx, socket, h, 20*time.Millisecond, slog.New(slog.DiscardHandler)) })
	end = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	t.Cleanup(end)
	eventually(t, "its socket", func() bool {
		return !unixsocket.IsAbandoned(socket)
	})
	return end
}

// TestProbesSayWhatHealthSays compares with /healthz of the metrics port; the readiness probe wants
// the listening sockets as well.
func TestProbesSayWhatHealthSays(t *testing.T) {
	for name, tt := range map[string]struct{ known, serves, live, ready bool }{
		"it has just started":                  {},
		"it serves pods that are not listed":   {serves: true},
		"it waits for its predecessor":         {known: true, live: true},
		"it serves":                            {known: true, serves: true, live: true, ready: true},
		"it has handed over, and served first": {known: true, serves: true, live: true, ready: true},
	} {
		t.Run(name, func(t *testing.T) {
			p, _, end := lives(t, onePod(), nil)
			defer end()
			eventually(t, "its pods", p.isReady)
			if !tt.known {
				// As before the API server has listed them.
				p.wasReady.Store(false)
				p.watch = unsynced(t)
			}
			var serves atomic.Bool
			serves.Store(tt.serves)
			dir := shortDir(t)
			answersProbes(t, probeSocket(dir, 1), probeHandler(p, serves.Load))
			status, _ := get(adminServer(p, &options{}, slog.New(slog.DiscardHandler)).Handler, "/healthz")
			if healthy := status == http.StatusOK; healthy != tt.live {
				t.Errorf("/healthz: %d", status)
			}
			for command, want := range map[string]bool{"live": tt.live, "ready": tt.ready} {
				if answer, err := requestProbe(t.Context(), probeSocket(dir, 1), command); (err == nil) != want {
					t.Errorf("%s: %q, %v", command, answer, err)
				}
			}
		})
	}
}

// TestProbesAskTheProxyOfTheirOwnContainer has two proxies overlap, as in an upgrade. Each
// container has its own PID namespace.
func TestProbesAskTheProxyOfTheirOwnContainer(t *testing.T) {
	dir := shortDir(t)
	saying := func(text string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) })
	}
	endOld := answersProbes(t, probeSocket(dir, 1), saying("old"))
	answersProbes(t, probeSocket(dir, 2), saying("new"))
	ask := func(namespace uint64) string {
		answer, err := requestProbe(t.Context(), probeSocket(dir, namespace), "live")
		if err != nil {
			return "none"
		}
		return answer
	}
	if got := ask(1) + ", " + ask(2); got != "old, new" {
		t.Errorf("the probes of two containers are answered by %s", got)
	}
	endOld()
	if got := ask(1) + ", " + ask(2); got != "none, new" {
		t.Errorf("after the old one ended, by %s", got)
	}
	// What the old one left goes with the next start.
	answersProbes(t, probeSocket(dir, 3), saying("newer"))
	left, err := filepath.Glob(filepath.Join(proxyDir(dir), "*"))
	if want := probeSocket(dir, 2) + " " + probeSocket(dir, 3); err != nil || strings.Join(left, " ") != want {
		t.Errorf("there are %q, %v", left, err)
	}
}

func TestProbeSocketIsRootsAlone(t *testing.T) {
	dir := shortDir(t)
	socket := probeSocket(dir, 1)
	answersProbes(t, socket, http.NotFoundHandler())
	info, err := os.Lstat(socket)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket: %v, %v", info.Mode(), err)
	}
	if info, err = os.Lstat(proxyDir(dir)); err != nil || info.Mode() != os.ModeDir|0o700 {
		t.Errorf("its directory: %v, %v", info.Mode(), err)
	}
}

// TestProbeSocketThatIsRemovedIsMadeAgain has the kubelet not restart a proxy for it.
func TestProbeSocketThatIsRemovedIsMadeAgain(t *testing.T) {
	socket := probeSocket(shortDir(t), 1)
	answersProbes(t, socket, http.NotFoundHandler())
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	eventually(t, "answered again", func() bool {
		_, err := requestProbe(t.Context(), socket, "live")
		return err != nil && strings.Contains(err.Error(), "404")
	})
}

// TestProbeIsBounded has somebody at the socket who never answers, or never stops.
func TestProbeIsBounded(t *testing.T) {
	for name, answer := range map[string]func(net.Conn){
		"silent":       func(net.Conn) {},
		"long headers": func(c net.Conn) { endless(c, "HTTP/1.1 200 OK\r\n", "a: b\r\n") },
		"long answer":  func(c net.Conn) { endless(c, "HTTP/1.1 200 OK\r\n\r\n", strings.Repeat("x", 4096)) },
	} {
		t.Run(name, func(t *testing.T) {
			socket := probeSocket(shortDir(t), 1)
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			asked := make(chan struct{})
			go func() {
				defer close(asked)
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				c.Read(make([]byte, 1024))
				answer(c)
				io.Copy(io.Discard, c) // until the probe hangs up
			}()
			ctx := t.Context()
			if name == "silent" { // of the others the size is bounded
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
				defer cancel()
			}
			text, err := requestProbe(ctx, socket, "live")
			switch {
			case name == "long answer" && (err != nil || len(text) != maxProbeAnswer):
				t.Errorf("%d bytes, %v", len(text), err)
			case name == "silent" && !errors.Is(err, context.DeadlineExceeded):
				t.Errorf("%v", err)
			case name == "long headers" && err == nil:
				t.Error("no error")
			}
			<-asked
		})
	}
}

func endless(w io.Writer, first, then string) {
	_, err := io.WriteString(w, first)
	for err == nil {
		_, err = io.WriteString(w, then)
	}
}

// TestProbeCommandsExitByTheAnswer runs them as the kubelet does, against the socket of this test's
// PID namespace.
func TestProbeCommandsExitByTheAnswer(t *testing.T) {
	dir := shortDir(t)
	command := func(args ...string) (int, string) {
		var out, errs bytes.Buffer
		code := run(append([]string{"kube2iam-proxy"}, args...), &out, &errs)
		return code, out.String() + errs.String()
	}
	if code, said := command("ready", "--state-dir", dir); code != exitFailure || !strings.Contains(said, dir) {
		t.Errorf("where no proxy is: %d %s", code, said)
	}
	namespace, err := pidNamespace()
	if err != nil {
		t.Fatal(err)
	}
	answersProbes(t, probeSocket(dir, namespace), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/live" {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
		}
	}))
	if code, said := command("live", "--state-dir", dir); code != 0 {
		t.Errorf("live: %d %s", code, said)
	}
	t.Setenv("KUBE2IAM_STATE_DIR", dir)
	if code, said := command("ready"); code != exitFailure || !strings.Contains(said, "not yet") {
		t.Errorf("ready: %d %s", code, said)
	}
}

// unsynced is a watch that has not listed any pod.
func unsynced(t *testing.T) *pods.Watch {
	t.Helper()
	p := newComponents(&options{node: "node-1"}, onePod(), new(countingSTS), attachment.NewIndex(attachment.In(t.TempDir())), slog.New(slog.DiscardHandler))
	return p.watch
}

// TestKubeletWaitsLongerThanProbes compares probeTimeout with the manifests: the kubelet must not end a probe that would have
// printed why it fails. The liveness probe leaves a busy node seconds more to start the command, for its failures kill the proxy.
func TestKubeletWaitsLongerThanProbes(t *testing.T) {
	const toStart = 5 * time.Second
	text, err := os.ReadFile(filepath.Join("..", "conf", "kustomize", "proxy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var set appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(text, &set); err != nil {
		t.Fatal(err)
	}
	c := set.Spec.Template.Spec.Containers[0]
	wait := func(p *corev1.Probe) time.Duration { return time.Duration(p.TimeoutSeconds) * time.Second }
	for name, p := range map[string]*corev1.Probe{"startup": c.StartupProbe, "readiness": c.ReadinessProbe, "liveness": c.LivenessProbe} {
		if wait(p) <= probeTimeout {
			t.Errorf("the kubelet waits %v for the %s probe, which takes up to %v", wait(p), name, probeTimeout)
		}
	}
	if wait(c.LivenessProbe) < probeTimeout+toStart {
		t.Errorf("the kubelet waits %v for the liveness probe, want at least %v", wait(c.LivenessProbe), probeTimeout+toStart)
	}
	// The cluster suite compares all of the chart with these manifests.
	chart, err := os.ReadFile(filepath.Join("..", "conf", "helm", "kube2iam-cni", "templates", "proxy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	timeouts := regexp.MustCompile(`timeoutSeconds: \d+`)
	if diff := cmp.Diff(timeouts.FindAllString(string(text), -1), timeouts.FindAllString(string(chart), -1)); diff != "" {
		t.Errorf("of kustomize (-) and helm (+):\n%s", diff)
	}
}
