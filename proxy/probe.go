package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/unixsocket"
)

const (
	// probeTimeout bounds a probe. It is shorter than timeoutSeconds in the manifests: a probe
	// fails with a reason.
	probeTimeout = 3 * time.Second
	// maxProbeAnswer bounds the part of an answer that a probe reads, in bytes.
	maxProbeAnswer = 1 << 10
	// probeInterval is the time between two checks of the probe socket.
	probeInterval = 5 * time.Second
)

// probeHelp is the help of the commands that the kubelet runs in the proxy's container. Each
// requests the path of its name.
var probeHelp = map[string]string{
	"ready": `kube2iam-proxy ready - succeed if the proxy of this container serves the node's pods

For the startup and the readiness probe. The proxy serves once it has its listening sockets, which a
new proxy takes over from the one before, and once the API server has listed the pods of this node.`,
	"live": `kube2iam-proxy live - succeed if the proxy of this container is healthy

For the liveness probe. The proxy is healthy if it answers and the API server has listed the pods of
this node once. It stays so while the API server, STS or the metadata service are down.`,
}

// probe runs `kube2iam-proxy ready` and `kube2iam-proxy live`. It asks the proxy over a unix socket
// that only root reaches: on the node's network, a pod with the same hostPort would receive the
// request.
func probe(ctx context.Context, name string, args []string, stdout io.Writer) error {
	flags := newCategory(name)
	stateDir := flags.String("state-dir", defaultStateDir, stateDirUsage)
	switch err := parseFlags(args, flags); {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Fprintf(stdout, "%s\n\nIt exits with 1 and prints the reason otherwise. Run it in the proxy's PID namespace.\n\n%s", probeHelp[name], flags.usages())
		return nil
	case err != nil:
		return &usageError{fmt.Errorf("%s: %w", name, err)}
	}
	namespace, err := pidNamespace()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	answer, err := requestProbe(ctx, probeSocket(*stateDir, namespace), name)
	if err == nil {
		fmt.Fprintln(stdout, answer)
	}
	return err
}

// requestProbe asks the proxy that listens on a unix socket. The error is the proxy's reason, or
// why it does not answer.
func requestProbe(ctx context.Context, socket, name string) (answer string, err error) {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: 4 << 10,
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://proxy/"+name, nil)
	if err != nil {
		return "", err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return "", fmt.Errorf("no proxy of this container answers at %s: %w", socket, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxProbeAnswer))
	if err != nil {
		return "", fmt.Errorf("the proxy's answer: %w", err)
	}
	answer = strings.TrimSpace(string(text))
	if response.StatusCode != http.StatusOK {
		return "", errors.New(answer)
	}
	return answer, nil
}

// pidNamespace returns the inode of this process's PID namespace. A container has its own, and a
// probe that the kubelet runs in the container is in it (namespaces(7)).
func pidNamespace() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return 0, fmt.Errorf("PID namespace: %w", err)
	}
	return st.Ino, nil
}

// probeSocket returns the path of the unix socket of the proxy that runs in a PID namespace. Two
// proxies that run at the same time during an upgrade have different sockets.
func probeSocket(stateDir string, pidNamespace uint64) string {
	return filepath.Join(proxyDir(stateDir), fmt.Sprintf("probe-%d.sock", pidNamespace))
}

// probeHandler answers probes. A proxy that has handed its sockets over stays ready.
func probeHandler(c *components, isServing func() bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /live", c.serveHealth)
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, r *http.Request) {
		if !isServing() {
			http.Error(w, "this proxy does not have its listening sockets yet: another one serves, or holds a port",
				http.StatusServiceUnavailable)
			return
		}
		c.serveHealth(w, r)
	})
	return mux
}

// serveProbes answers probes on a unix socket until ctx ends. It removes the sockets of proxies
// that were killed.
func serveProbes(ctx context.Context, path string, h http.Handler, interval time.Duration, log *slog.Logger) error {
	sockets, err := filepath.Glob(filepath.Join(filepath.Dir(path), "probe-*"))
	if err != nil {
		return err
	}
	for _, socket := range sockets {
		if unixsocket.IsAbandoned(socket) {
			os.Remove(socket)
		}
	}
	l, err := unixsocket.Listen(ctx, path, interval, log)
	if err != nil {
		return nil // ctx has ended
	}
	return serveHTTP(ctx, boundedServer(h, log), l, nil)
}
