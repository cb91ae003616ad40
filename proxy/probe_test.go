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

// shortDir returns a state directory with the proxy's directory in it. Its path is short enough for
// the paths of unix sockets (unix(7)).
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

// startProbes answers probes at a socket until end is called or the test ends.
func startProbes(t *testing.T, socket string, h http.Handler) (end func()) {
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

// TestProbesMatchHealthz: the liveness probe reports what /healthz does; the readiness probe also
// requires the listening sockets.
func TestProbesMatchHealthz(t *testing.T) {
	for name, tt := range map[string]struct{ known, serves, live, ready bool }{
		"started":                     {},
		"serving, pods not listed":    {serves: true},
		"waiting for the predecessor": {known: true, live: true},
		"serving":                     {known: true, serves: true, live: true, ready: true},
	} {
		t.Run(name, func(t *testing.T) {
			p, _, end := startComponents(t, oneRunningPod(), nil)
			defer end()
			eventually(t, "its pods", p.isReady)
			if !tt.known {
				// The state before the API server has listed the pods.
				p.wasReady.Store(false)
				p.watch = unsynced(t)
			}
			var serves atomic.Bool
			serves.Store(tt.serves)
			dir := shortDir(t)
			startProbes(t, probeSocket(dir, 1), probeHandler(p, serves.Load))
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

// TestProbesAskTheirOwnContainer runs two proxies at once, as an upgrade does. Each container has
// its own PID namespace.
func TestProbesAskTheirOwnContainer(t *testing.T) {
	dir := shortDir(t)
	saying := func(text string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) })
	}
	endOld := startProbes(t, probeSocket(dir, 1), saying("old"))
	startProbes(t, probeSocket(dir, 2), saying("new"))
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
	// The next proxy removes the old proxy's socket.
	startProbes(t, probeSocket(dir, 3), saying("newer"))
	left, err := filepath.Glob(filepath.Join(proxyDir(dir), "*"))
	if want := probeSocket(dir, 2) + " " + probeSocket(dir, 3); err != nil || strings.Join(left, " ") != want {
		t.Errorf("sockets are %q, %v", left, err)
	}
}

func TestProbeSocketPermissions(t *testing.T) {
	dir := shortDir(t)
	socket := probeSocket(dir, 1)
	startProbes(t, socket, http.NotFoundHandler())
	info, err := os.Lstat(socket)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket: %v, %v", info.Mode(), err)
	}
	if info, err = os.Lstat(proxyDir(dir)); err != nil || info.Mode() != os.ModeDir|0o700 {
		t.Errorf("its directory: %v, %v", info.Mode(), err)
	}
}

// TestRemovedProbeSocket: the proxy makes a new socket, so the kubelet need not restart it.
func TestRemovedProbeSocket(t *testing.T) {
	socket := probeSocket(shortDir(t), 1)
	startProbes(t, socket, http.NotFoundHandler())
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	eventually(t, "answered again", func() bool {
		_, err := requestProbe(t.Context(), socket, "live")
		return err != nil && strings.Contains(err.Error(), "404")
	})
}

// TestProbeLimits probes a server that never answers, and servers whose answers never end.
func TestProbeLimits(t *testing.T) {
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
				io.Copy(io.Discard, c) // until the probe closes the connection
			}()
			ctx := t.Context()
			if name == "silent" { // the size of the others is bounded
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

// TestProbeCommands runs the commands as the kubelet does. The socket is that of the test's PID
// namespace.
func TestProbeCommands(t *testing.T) {
	dir := shortDir(t)
	command := func(args ...string) (int, string) {
		var out, errs bytes.Buffer
		code := run(append([]string{"kube2iam-proxy"}, args...), &out, &errs)
		return code, out.String() + errs.String()
	}
	if code, said := command("ready", "--state-dir", dir); code != exitFailure || !strings.Contains(said, dir) {
		t.Errorf("without a proxy: %d %s", code, said)
	}
	namespace, err := pidNamespace()
	if err != nil {
		t.Fatal(err)
	}
	startProbes(t, probeSocket(dir, namespace), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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

// unsynced returns a watch that has not listed the pods.
func unsynced(t *testing.T) *pods.Watch {
	t.Helper()
	p := newComponents(&options{node: "node-1"}, oneRunningPod(), new(countingSTS), attachment.NewIndex(attachment.In(t.TempDir())), slog.New(slog.DiscardHandler))
	return p.watch
}

// TestProbeTimeoutsInManifests: the kubelet must not kill a probe before it prints why it fails.
// The liveness probe has more time, because a busy node starts commands slowly, and its failures
// kill the proxy.
func TestProbeTimeoutsInManifests(t *testing.T) {
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
