package main

import (
	"cmp"
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
	"sync/atomic"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
)

// probeTimeout bounds a probe. It is shorter than the manifests' timeoutSeconds, so a probe fails
// with a reason.
const probeTimeout = 3 * time.Second

// maxProbeAnswer bounds what a probe reads of an answer, in bytes.
const maxProbeAnswer = 1 << 10

// probeCommands are the commands that the kubelet runs in the proxy's container, by name. Each asks
// for the path of its name.
var probeCommands = map[string]struct{ summary, description string }{
	"ready": {
		"succeed if the proxy of this container serves the node's pods",
		`For the startup and the readiness probe. The proxy serves once it has its listening sockets, which a new proxy takes over from the
one before, and once the API server has listed the pods of this node.`,
	},
	"live": {
		"succeed if the proxy of this container is healthy",
		`For the liveness probe. It says what /healthz on the metrics port says: the proxy answers, and the API server has listed the pods of
this node once. It stays so while the API server, STS or the metadata service are down.`,
	},
}

// probe runs `kube2iam-proxy ready` and `kube2iam-proxy live`. It asks the proxy over a unix socket
// that only root can reach: on the node's network, a pod with a hostPort of the same number would
// receive the request.
func probe(ctx context.Context, name string, args []string, stdout io.Writer) error {
	f := pflag.NewFlagSet(name, pflag.ContinueOnError)
	f.Usage = func() {}
	stateDir := f.String("state-dir", cmp.Or(os.Getenv("KUBE2IAM_STATE_DIR"), defaultStateDir), "the proxy's --state-dir: `DIR` [$KUBE2IAM_STATE_DIR]")
	switch err := f.Parse(args); {
	case errors.Is(err, pflag.ErrHelp):
		c := probeCommands[name]
		fmt.Fprintf(stdout, "kube2iam-proxy %s - %s\n\n%s\n\nIt exits with 0 if so, and with 1 and the reason if not. Run it in the proxy's container, or\nwhere the proxy runs without one: it asks the proxy of its own PID namespace.\n\n%s", name, c.summary, c.description, f.FlagUsages())
		return nil
	case err != nil:
		return &usageError{err}
	case f.NArg() > 0:
		return &usageError{fmt.Errorf("%s: unexpected argument %q", name, f.Arg(0))}
	}
	namespace, err := pidNamespace()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	answer, err := askProbe(ctx, probeSocket(*stateDir, namespace), name)
	if err == nil {
		fmt.Fprintln(stdout, answer)
	}
	return err
}

// askProbe asks the proxy that listens at a unix socket. The error is its reason, or why it does
// not answer.
func askProbe(ctx context.Context, socket, name string) (answer string, err error) {
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

// pidNamespace returns the number of this process's PID namespace. A container has one of its own,
// and a probe that the kubelet runs in the container is in it (namespaces(7), "The /proc/pid/ns/
// directory").
func pidNamespace() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return 0, fmt.Errorf("PID namespace: %w", err)
	}
	return st.Ino, nil
}

// probeSocket is the unix socket of the proxy that runs in a PID namespace. While two proxies
// overlap in an upgrade, each has its own.
func probeSocket(stateDir string, pidNamespace uint64) string {
	return filepath.Join(proxyDir(stateDir), fmt.Sprintf("probe-%d.sock", pidNamespace))
}

// probeHandler answers probes. serves tells whether this proxy has its listening sockets; that it
// has handed them over to a successor since does not count against it.
func probeHandler(p *parts, serves *atomic.Bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /live", p.serveHealth)
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, r *http.Request) {
		if !serves.Load() {
			http.Error(w, "this proxy does not have its listening sockets yet: another one serves, or holds a port", http.StatusServiceUnavailable)
			return
		}
		p.serveHealth(w, r)
	})
	return mux
}

// probeLook is how often the probe socket is looked at.
const probeLook = 5 * time.Second

// serveProbes answers probes at a unix socket until ctx ends. It looks for the socket at the interval
// look, and makes it again where it was removed.
func serveProbes(ctx context.Context, path string, h http.Handler, look time.Duration, log *slog.Logger) {
	removeDeadProbes(ctx, filepath.Dir(path))
	tick := time.NewTicker(look)
	defer tick.Stop()
	logged := ""
	for ctx.Err() == nil {
		l, err := handover.ListenUnix(path)
		if err == nil {
			err = serveWhileFound(ctx, path, h, l, tick, log)
		}
		if err == nil {
			continue
		}
		if text := err.Error(); text != logged {
			log.Warn("the probes of this container are not answered; trying again", "error", err)
			logged = text
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// serveWhileFound answers probes on l until ctx ends, or nothing listens at the path any more.
func serveWhileFound(ctx context.Context, path string, h http.Handler, l net.Listener, tick *time.Ticker, log *slog.Logger) error {
	serving, stop := context.WithCancel(ctx)
	defer stop()
	failed := make(chan error, 1)
	go func() { failed <- serveHTTP(serving, boundedServer(h, log), l, nil) }()
	for {
		select {
		case err := <-failed:
			return err
		case <-tick.C:
		}
		if found, err := handover.Find(serving, path); found != nil {
			found.Close()
		} else if err == nil {
			stop()
		}
	}
}

// removeDeadProbes removes the sockets of proxies that were killed: nothing else removes them.
func removeDeadProbes(ctx context.Context, dir string) {
	sockets, err := filepath.Glob(filepath.Join(dir, "probe-*"))
	if err != nil {
		return // only for a malformed pattern
	}
	for _, socket := range sockets {
		if found, err := handover.Find(ctx, socket); found != nil {
			found.Close()
		} else if err == nil {
			os.Remove(socket)
		}
	}
}
