package main

import (
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
)

// podPrefix and metricsPrefix begin the names of the sockets that pods are redirected to, and of
// the metrics port's. The address follows: a socket with another address is another socket.
const podPrefix, metricsPrefix = "pods ", "metrics "

// maxFormerPorts bounds the ports that pods are still redirected to after --app-port has changed.
const maxFormerPorts = 4

func podSocket(port uint16) handover.Socket {
	address := net.JoinHostPort("", strconv.Itoa(int(port)))
	return handover.Socket{Name: podPrefix + address, Address: address}
}

func metricsSocket(o *options) handover.Socket {
	host := ""
	if o.metricsAddress.IsValid() {
		host = o.metricsAddress.String()
	}
	address := net.JoinHostPort(host, strconv.Itoa(int(o.metricsPort)))
	return handover.Socket{Name: metricsPrefix + address, Address: address, ReusePort: true}
}

// newTakeover returns the takeover of the sockets of o and of the cache's credentials.
func newTakeover(o *options, c *components, log *slog.Logger) *handover.Takeover {
	return handover.New(handover.Config{
		Path:     handoverSocket(o.stateDir),
		Sockets:  []handover.Socket{podSocket(o.appPort), metricsSocket(o)},
		Optional: func(inherited []string) []handover.Socket { return formerSockets(o, inherited, log) },
		Import:   c.cache.Import, Export: c.cache.Export, IsReady: c.isReady, Log: log,
		Pending: func() int { return c.cache.Stats().Pending },
	})
}

// formerSockets returns the sockets of other ports that pods are redirected to: a pod keeps the
// port of its ADD when --app-port changes. The predecessor's ports are served even if no record
// names them: until the agent has rewritten the plugin's entry, an ADD still uses the former port.
// After a crash there is no predecessor, and the records name the ports.
func formerSockets(o *options, inherited []string, log *slog.Logger) []handover.Socket {
	var former []handover.Socket
	add := func(s handover.Socket) {
		if s.Name != podSocket(o.appPort).Name && len(former) < maxFormerPorts && !slices.Contains(former, s) {
			log.Info("serving pods that are redirected to a former port", "address", s.Address)
			former = append(former, s)
		}
	}
	for _, name := range inherited {
		if address, ok := strings.CutPrefix(name, podPrefix); ok {
			add(handover.Socket{Name: name, Address: address})
		}
	}
	records, err := attachment.In(o.stateDir).List()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("not all records can be read: pods may be redirected to a port that is not served", "error", err)
	}
	for _, r := range records {
		for _, redirect := range r.Redirects {
			if port := redirect.Proxy.Port(); port != 0 && port != o.metricsPort {
				add(podSocket(port))
			}
		}
	}
	return former
}

// podListeners returns the listeners of the sockets that pods are redirected to. They share the
// limits of connections and requests.
func podListeners(sockets map[string]*handover.Listener, redirected imds.Destinations, o *options, c *components, log *slog.Logger) []*imds.Listener {
	connections := imds.NewConnections(o.podRequests)
	var listeners []*imds.Listener
	for name, l := range sockets {
		if strings.HasPrefix(name, podPrefix) {
			listeners = append(listeners, imds.NewListener(l, redirected, c.broker.Identity, connections, c.metrics.ConnectionRefused, log))
		}
	}
	return listeners
}
