package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// probePrefix begins the names of the tables that count probes. They live for milliseconds; Repair takes away one whose
// process died.
const probePrefix = Table + "-probe-"

// A probe is looked for this often and this long: its first packet may have to wait for an answer to ARP.
const (
	probeWait = 5 * time.Millisecond
	probeTurn = 100
)

// Seen tells whether the host's netfilter sees what a pod sends to a service from one of its addresses: it counts such
// packets for a moment, and has the pod begin a connection. The error is ErrUnsupported on a kernel without nftables.
func (n *Node) Seen(netnsPath string, source netip.Addr, service netip.AddrPort) (bool, error) {
	probe, port, err := bound(netnsPath, source)
	if err != nil {
		return false, err
	}
	defer unix.Close(probe)
	k := new(nft)
	defer k.close()
	conn, err := k.open()
	if err != nil {
		return false, err
	}
	f := familyOf(source)
	t := &nftables.Table{Name: fmt.Sprint(probePrefix, os.Getpid()), Family: f.table}
	conn.AddTable(t)
	c := conn.AddChain(hooked(t, "count", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeBridgeNF).Chain)
	conn.AddRule(&nftables.Rule{Table: t, Chain: c, Exprs: slices.Concat(
		f.is(f.saddr, source), f.is(f.daddr, service.Addr()), isTCP(),
		[]expr.Any{
			// Source and destination port: a neighbour that forges the address does not know the first.
			&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 4},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: append(portBytes(port), portBytes(service.Port())...)},
			&expr.Counter{},
		})})
	if err := supported(conn.Flush()); err != nil {
		return false, err
	}
	defer func() {
		conn.DelTable(t)
		conn.Flush()
	}()
	if err := unix.Connect(probe, sockaddr(service)); err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.ECONNREFUSED) {
		return false, fmt.Errorf("network namespace %s: a connection from %s to %s: %w", netnsPath, source, service, err)
	}
	for range probeTurn {
		rules, err := conn.GetRules(t, c)
		if err != nil {
			return false, supported(err)
		}
		for _, r := range rules {
			for _, e := range r.Exprs {
				if counter, ok := e.(*expr.Counter); ok && counter.Packets > 0 {
					return true, nil
				}
			}
		}
		time.Sleep(probeWait)
	}
	return false, nil
}

func (f *family) is(offset uint32, ip netip.Addr) []expr.Any {
	return []expr.Any{f.load(offset, reg0), &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: addrBytes(ip)}}
}

func portBytes(port uint16) []byte { return []byte{byte(port >> 8), byte(port)} }

// bound is a socket in a network namespace that has an address of one of its interfaces, and the port that it was given. It
// belongs to the namespace whichever thread uses it.
func bound(netnsPath string, source netip.Addr) (fd int, port uint16, err error) {
	pod, err := openPod(netnsPath)
	if err != nil {
		return -1, 0, err
	}
	defer pod.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine, in the pod's namespace
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
		var own unix.Sockaddr
		if err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(source, 0))); err == nil {
			own, err = unix.Getsockname(fd)
		}
		switch a := own.(type) {
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

// endProbes takes away what probes left whose process died, and names it; it only looks, where dry is true.
func (k *nft) endProbes(dry bool) ([]string, error) {
	conn, err := k.open()
	if err != nil {
		return nil, err
	}
	tables, err := listTables(conn)
	if err != nil {
		return nil, err
	}
	var did []string
	for _, t := range tables {
		if strings.HasPrefix(t.Name, probePrefix) {
			did = append(did, fmt.Sprintf("stale: table %s %s", familyName(t.Family), t.Name))
			if !dry {
				conn.DelTable(t)
			}
		}
	}
	if dry || len(did) == 0 {
		return did, nil
	}
	return did, supported(conn.Flush())
}
