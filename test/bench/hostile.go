package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	hostileConnections = 256 // of each pod
	hostileRounds      = 3
	hostileHold        = 5 * time.Second // how long a round holds its connections
)

// hostile measures the largest resident memory of the proxy while each pod holds as many
// connections as it may have: idle ones after a request, and ones on which most of a large request
// was sent.
func hostile(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	fmt.Fprintf(progress, "the proxy's memory while %d pods hold %d connections each: %d rounds of each kind\n", memoryPods, hostileConnections, hostileRounds)
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "ptp"})
	if err != nil {
		return nil, err
	}
	defer bed.Close()
	pods, err := hostilePods(bed)
	if err != nil {
		return nil, err
	}
	// The pods share a network namespace and a veth: one rule redirects all of them.
	proxy, err := crowded(ctx, bed, memoryPods, "--iptables", "--host-ip", testbed.NodeIP.String(), "--host-interface", hostileLink)
	if err != nil {
		return nil, err
	}
	stop, peak := make(chan struct{}), make(chan int)
	go func() {
		most := 0
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			if now, err := resident(proxy.PID()); err == nil {
				most = max(most, now)
			}
			select {
			case <-tick.C:
			case <-stop:
				peak <- most
				return
			}
		}
	}()
	request := "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: x\r\n"
	served := 0
	for _, idle := range []bool{true, false} {
		for range hostileRounds {
			if idle {
				served += holdAll(ctx, pods, request+"\r\n", isServed)
			} else {
				holdAll(ctx, pods, request+"X: "+strings.Repeat("x", 15<<10), isOpen)
			}
		}
	}
	close(stop)
	most := <-peak
	if served == 0 {
		return nil, fmt.Errorf("no connection of the pods was served")
	}
	fmt.Fprintf(progress, "%d of %d connections were served\n", served, memoryPods*hostileConnections*hostileRounds)
	return []figure{{"rss_mib_hostile", float64(most) / (1 << 20), "MiB"}}, ctx.Err()
}

const hostileLink = "hostile0"

// hostilePods makes the namespace with the addresses of all pods.
func hostilePods(bed *testbed.Bed) (*netnstest.Namespace, error) {
	shared, err := bed.NewSandbox("default", "hostile", "hostile")
	if err != nil {
		return nil, err
	}
	netns, err := os.Open(shared.Netns.Path())
	if err != nil {
		return nil, err
	}
	defer netns.Close()
	up := func(name string, addresses ...string) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addresses {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("%s: %w", a, err)
			}
		}
		return netlink.LinkSetUp(link)
	}
	err = bed.Node.Do(func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: hostileLink}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(netns.Fd()))}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return up(hostileLink, "10.201.1.254/24")
	})
	if err != nil {
		return nil, err
	}
	return shared.Netns, shared.Netns.Do(func() error {
		var addresses []string
		for i := range memoryPods {
			addresses = append(addresses, podAddress(i)+"/24")
		}
		if err := up("eth0", addresses...); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("10.201.1.254")})
	})
}

func podAddress(pod int) string { return fmt.Sprintf("10.201.1.%d", pod) }

// holdAll has every pod open its connections and send a request over each. It holds those that stay
// open for a while and returns their number.
func holdAll(ctx context.Context, pods *netnstest.Namespace, request string, stays func(net.Conn) bool) int {
	var mu sync.Mutex
	var held []net.Conn
	var g errgroup.Group
	g.SetLimit(64)
	for pod := range memoryPods {
		g.Go(func() error {
			dialer := net.Dialer{Timeout: 2 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(podAddress(pod)), 0))}
			for range hostileConnections {
				var c net.Conn
				err := pods.Do(func() (err error) {
					c, err = dialer.DialContext(ctx, "tcp", testbed.MetadataAddr)
					return err
				})
				if err != nil {
					continue
				}
				if _, err := io.WriteString(c, request); err != nil || !stays(c) {
					c.Close()
					continue
				}
				mu.Lock()
				held = append(held, c)
				mu.Unlock()
			}
			return nil
		})
	}
	g.Wait()
	select {
	case <-time.After(hostileHold):
	case <-ctx.Done():
	}
	for _, c := range held {
		c.Close()
	}
	return len(held)
}

func isServed(c net.Conn) bool {
	c.SetDeadline(time.Now().Add(5 * time.Second))
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return false
	}
	io.Copy(io.Discard, res.Body)
	return res.StatusCode == http.StatusOK
}

// isOpen reports whether the proxy has not reset the connection while it waits for the rest of a
// request.
func isOpen(c net.Conn) bool {
	c.SetDeadline(time.Now().Add(20 * time.Millisecond))
	_, err := c.Read(make([]byte, 1))
	return errors.Is(err, os.ErrDeadlineExceeded)
}
