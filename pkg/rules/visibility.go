package rules

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/podnetns"
)

// The counter of a probe is read this often, after each of these times: the first packet can have
// to wait for an answer to ARP.
const (
	probeInterval = 5 * time.Millisecond
	probeReads    = 100
)

// PassesNetfilter reports whether the host's netfilter sees what a pod sends to a service from one
// of its addresses. It makes a table that counts such packets, and has a socket in the pod's
// namespace begin a connection. The error is ErrUnsupported on a kernel without nftables.
func (n *Node) PassesNetfilter(ctx context.Context, netnsPath string, source netip.Addr, service netip.AddrPort) (bool, error) {
	socket, port, err := boundSocket(netnsPath, source)
	if err != nil {
		return false, err
	}
	defer unix.Close(socket)
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return false, nft.WrapError(err)
	}
	defer conn.CloseLasting()
	f := familyOf(source)
	t := conn.AddTable(&nftables.Table{Name: fmt.Sprint(nft.ProbePrefix, os.Getpid()), Family: f.table})
	chain := conn.AddChain(newChain(t, "count", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, bindingPriority).Chain)
	conn.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: slices.Concat(
		[]expr.Any{f.loadAddr(f.saddr, register0), equal(addrBytes(source)), f.loadAddr(f.daddr, register0), equal(addrBytes(service.Addr()))},
		matchProtocol(unix.IPPROTO_TCP),
		[]expr.Any{
			// Both ports: a neighbour that forges the address does not know the source port.
			&expr.Payload{DestRegister: register0, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 4},
			equal(append(portBytes(port), portBytes(service.Port())...)),
			&expr.Counter{},
		})})
	if err := conn.Flush(); err != nil {
		return false, nft.WrapError(err)
	}
	defer func() {
		conn.DelTable(t)
		conn.Flush()
	}()
	err = unix.Connect(socket, sockaddr(service))
	if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.ECONNREFUSED) {
		return false, fmt.Errorf("network namespace %s: a connection from %s to %s: %w", netnsPath, source, service, err)
	}
	for range probeReads {
		rules, err := conn.GetRules(t, chain)
		if err != nil {
			return false, nft.WrapError(err)
		}
		for _, r := range rules {
			for _, e := range r.Exprs {
				if counter, isCounter := e.(*expr.Counter); isCounter && counter.Packets > 0 {
					return true, nil
				}
			}
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(probeInterval):
		}
	}
	return false, nil
}

// boundSocket returns a TCP socket in a pod's network namespace that is bound to an address there,
// and its port. A socket stays in its namespace whichever thread uses it.
func boundSocket(netnsPath string, source netip.Addr) (fd int, port uint16, err error) {
	pod, err := podnetns.Open(netnsPath)
	if err != nil {
		return -1, 0, err
	}
	defer pod.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // without an unlock the thread ends with the goroutine, in the pod's namespace
		if err = netns.Set(pod); err != nil {
			return
		}
		domain := unix.AF_INET
		if source.Is6() {
			domain = unix.AF_INET6
		}
		if fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		var bound unix.Sockaddr
		if err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(source, 0))); err == nil {
			bound, err = unix.Getsockname(fd)
		}
		switch a := bound.(type) {
		case *unix.SockaddrInet4:
			port = uint16(a.Port)
		case *unix.SockaddrInet6:
			port = uint16(a.Port)
		}
		if err != nil {
			unix.Close(fd)
		}
	}()
	<-done
	if err != nil {
		return -1, 0, fmt.Errorf("network namespace %s: a socket with %s: %w", netnsPath, source, err)
	}
	return fd, port, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is6() {
		return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}
