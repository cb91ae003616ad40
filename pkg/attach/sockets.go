package attach

import (
	"errors"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/sockdiag"
)

// destroySockets begins to destroy the proxy's sockets to the addresses of an attachment that is
// being added. It returns a function that waits until none of them can send. A pod that
// ended before it acknowledged an answer leaves a socket that retransmits the answer, with
// credentials, to the next holder of the address.
//
// It begins after the new holder's record is written, and ends before ADD returns. The proxy reads
// the record before it writes, so each answer to an earlier holder is one of three cases:
//   - The proxy reads the new record. It resets the connection and does not answer.
//   - It reads the old record and writes before its socket is destroyed. The kernel drops the
//     queue.
//   - It reads the old record and writes after that. The write fails, because the socket is closed.
//
// If it began before the record is written, the proxy could answer on a socket that it accepts
// after the others are destroyed. The order of sockets and rules does not matter.
//
// It destroys sockets of the proxy's ports only: the host can have other connections to an address
// that a pod gets on an isolated network. The pod has no connection yet, because its containers
// start after ADD. The agent does not call it for the running pods that it attaches.
func (n *Node) destroySockets(r *attachment.Record) (wait func() error) {
	end := n.DestroySockets(n.proxyPorts(r), r.IPs)
	return func() error {
		destroyed, err := end()
		if errors.Is(err, sockdiag.ErrUnsupported) {
			n.log.Warn("This kernel cannot destroy TCP sockets (CONFIG_INET_DIAG_DESTROY): for up to one second, unacknowledged answers to an earlier pod can reach this one.",
				"attachment", r.ID(), "addresses", r.IPs, "error", err)
			err = nil
		}
		if destroyed > 0 {
			n.log.Info("destroyed sockets to an earlier holder of the addresses", "attachment", r.ID(), "addresses", r.IPs, "sockets", destroyed)
		}
		// Packets that the sockets sent before can wait for an answer to ARP or NDP, which the new
		// holder will give.
		errs := []error{err}
		for _, ip := range r.IPs {
			errs = append(errs, n.DropQueued(ip))
		}
		return errors.Join(errs...)
	}
}

// DestroySocketsOfRemoved begins to destroy the sockets to the addresses of an attachment that is
// being removed, and returns a function that waits for the end. Otherwise their answers would be
// retransmitted until the next ADD. It leaves out addresses that another attachment holds or may
// hold. An error fails neither DEL nor collection: the next ADD with one of the addresses destroys
// the rest.
func (n *Node) DestroySocketsOfRemoved(r *attachment.Record) (wait func()) {
	ips := slices.DeleteFunc(slices.Clone(r.IPs), func(ip netip.Addr) bool {
		holder, err := n.Records.Holder(ip)
		if err != nil {
			return !errors.Is(err, fs.ErrNotExist)
		}
		return holder.ID() != r.ID()
	})
	if len(ips) == 0 {
		return func() {}
	}
	end := n.DestroySockets(n.proxyPorts(r), ips)
	return func() {
		if _, err := end(); err != nil && !errors.Is(err, sockdiag.ErrUnsupported) {
			n.log.Warn("sockets of a removed attachment could not be destroyed", "attachment", r.ID(), "addresses", ips, "error", err)
		}
	}
}

// proxyPorts returns the configured port, where an earlier holder of the addresses was served, and
// those on record.
func (n *Node) proxyPorts(r *attachment.Record) []uint16 {
	ports := []uint16{n.ProxyPort}
	for _, redirect := range r.Redirects {
		if port := redirect.Proxy.Port(); !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	return ports
}
