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

// network is where the node's own processes dial and listen.
func (n *node) network() network { return network(filepath.Join("/proc", n.pid, "ns", "net")) }

// outside is the network beyond the node.
func (n *node) outside() network { return network(n.path("/run/netns/outside")) }

// dial is net.Dialer.DialContext from there. The address must be an IP's: a name would be looked up
// by another thread, elsewhere.
func (w network) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = ns.WithNetNSPath(string(w), func(ns.NetNS) error {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// listen is net.Listen there.
func (w network) listen(network, address string) (l net.Listener, err error) {
	err = ns.WithNetNSPath(string(w), func(ns.NetNS) error {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// client asks over HTTP from there.
func (w network) client() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: w.dial}}
}

// ok asks for a URL once; any answer but 200 is an error.
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
