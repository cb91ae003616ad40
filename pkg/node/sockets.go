package node

import (
	"errors"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/sockdiag"
)

// destroySockets begins to destroy the proxy's sockets to the addresses of an attachment that is being added. It returns a function
// that waits until no byte of theirs can be sent any more. A pod that died before it acknowledged an answer leaves a socket
// that retransmits the answer, with credentials, to the next holder of the address.
//
// It begins after the record of the new holder is written, and ends before ADD returns. The proxy reads the record before it
// writes, so each answer to an earlier holder falls into one of three cases:
//   - the proxy looks after the record was written: it resets the connection in place of answering;
//   - it looked before, and writes before its socket is destroyed: the kernel drops what is queued;
//   - it looked before, and writes after: the write fails, because the socket is closed.
//
// If it began before the record was written, the proxy could still answer on a socket that it accepts after the others were
// destroyed. The order of sockets and rules does not matter.
//
// Only sockets of the proxy's ports are destroyed: the host may have connections of its own to an address that a pod gets
// on an isolated network. The pod has none yet, because its containers start after ADD. The agent does not call it: a pod that it
// attaches is running.
func (n *Node) destroySockets(r *attachment.Record) (wait func() error) {
	end := n.DestroySockets(n.proxyPorts(r), r.IPs)
	return func() error {
		destroyed, err := end()
		if errors.Is(err, sockdiag.ErrUnsupported) {
			n.Log.Warn("this kernel cannot destroy TCP sockets (CONFIG_INET_DIAG_DESTROY): for up to one second, unacknowledged answers to an earlier pod may reach this one",
				"attachment", r.ID(), "addresses", r.IPs, "error", err)
			err = nil
		}
		if destroyed > 0 {
			n.Log.Info("destroyed sockets to an earlier holder of the addresses", "attachment", r.ID(), "addresses", r.IPs, "sockets", destroyed)
		}
		// What the sockets sent before may still wait for an answer by ARP or NDP, which the new holder is about to give.
		errs := []error{err}
		for _, ip := range r.IPs {
			errs = append(errs, n.DropQueued(ip))
		}
		return errors.Join(errs...)
	}
}

// destroySocketsOfRemoved begins to destroy the sockets to the addresses of an attachment that is
// being removed: otherwise their answers would be retransmitted until the next ADD. It leaves out
// addresses that another attachment holds or may hold. An error fails neither DEL nor collection: the
// next ADD with one of the addresses destroys what is left.
func (n *Node) destroySocketsOfRemoved(r *attachment.Record) (wait func()) {
	own := slices.DeleteFunc(slices.Clone(r.IPs), func(ip netip.Addr) bool {
		holder, err := n.records().Holder(ip)
		if err != nil {
			return !errors.Is(err, fs.ErrNotExist)
		}
		return holder.ID() != r.ID()
	})
	if len(own) == 0 {
		return func() {}
	}
	end := n.DestroySockets(n.proxyPorts(r), own)
	return func() {
		if _, err := end(); err != nil && !errors.Is(err, sockdiag.ErrUnsupported) {
			n.Log.Warn("sockets of a removed attachment could not be destroyed", "attachment", r.ID(), "addresses", own, "error", err)
		}
	}
}

// proxyPorts are the configured port, where an earlier holder of the addresses was served, and those that the record names.
func (n *Node) proxyPorts(r *attachment.Record) []uint16 {
	ports := []uint16{n.ProxyPort}
	for _, one := range r.Redirects {
		if port := one.Proxy.Port(); !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	return ports
}
