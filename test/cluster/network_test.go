//go:build cluster

package cluster

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
)

// network is a network namespace, by its path.
type network string

// network returns the network namespace of the node's own processes.
func (n *node) network() network { return network(filepath.Join("/proc", n.pid, "ns", "net")) }

// outside returns the network namespace outside the node.
func (n *node) outside() network { return network(n.path("/run/netns/outside")) }

// dial dials from the namespace. The address must have an IP: another thread, in another namespace,
// would resolve a name.
func (w network) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = ns.WithNetNSPath(string(w), func(ns.NetNS) error {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// listen listens in the namespace.
func (w network) listen(network, address string) (l net.Listener, err error) {
	err = ns.WithNetNSPath(string(w), func(ns.NetNS) error {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// client returns an HTTP client that dials from the namespace.
func (w network) client() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: w.dial}}
}

// ok requests a URL once. An answer other than 200 is an error.
func ok(ctx context.Context, client *http.Client, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, response.Status)
	}
	return nil
}
