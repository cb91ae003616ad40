package node

import (
	"errors"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/sockdiag"
)

// silence destroys the proxy's sockets to the addresses of an attachment that is being added. A pod that died before it
// acknowledged an answer leaves a socket that retransmits the answer, with credentials, to the next holder of the address.
//
// It comes after the record of the new holder, and before ADD returns. The proxy reads the record before it writes, so each
// answer to an earlier holder falls into one of three cases:
//   - the proxy looks after the record was written: it resets the connection in place of answering;
//   - it looked before, and writes before its socket is destroyed: the kernel drops what is queued;
//   - it looked before, and writes after: the write fails, because the socket is closed.
//
// Before the record, a proxy could answer on a socket that is accepted after the others were destroyed.
//
// Only sockets of the proxy's ports are destroyed: the host may have connections of its own to an address that a pod gets
// on an isolated network. The pod has none yet, because its containers start after ADD. A pod that is adopted or attached
// again is running, so its sockets are left alone.
func (n *Node) silence(r *attachment.Record) error {
	destroyed, err := n.DestroySockets(n.proxyPorts(r), r.IPs)
	if errors.Is(err, sockdiag.ErrUnsupported) {
		n.Log.Warn("unacknowledged answers to an earlier pod cannot be dropped: the proxy resets its connections within a second",
			"attachment", r.ID(), "addresses", r.IPs, "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	if destroyed > 0 {
		n.Log.Info("destroyed sockets to an earlier holder of the addresses", "attachment", r.ID(), "addresses", r.IPs, "sockets", destroyed)
	}
	// What the sockets sent before may still wait for an answer by ARP or NDP, which the new holder is about to give.
	var errs []error
	for _, ip := range r.IPs {
		errs = append(errs, n.DropQueued(ip))
	}
	return errors.Join(errs...)
}

// silenceGone does what silence does for an attachment that is no more, so that its answers are not sent until the next ADD
// comes. It leaves out addresses that another attachment holds. An error fails neither DEL nor collection: the next ADD with
// one of the addresses destroys the sockets.
func (n *Node) silenceGone(r *attachment.Record) {
	free := slices.DeleteFunc(slices.Clone(r.IPs), func(ip netip.Addr) bool {
		_, err := n.records().Holder(ip)
		return !errors.Is(err, fs.ErrNotExist)
	})
	if len(free) == 0 {
		return
	}
	if _, err := n.DestroySockets(n.proxyPorts(r), free); err != nil && !errors.Is(err, sockdiag.ErrUnsupported) {
		n.Log.Warn("sockets of an attachment that is gone could not be destroyed", "attachment", r.ID(), "addresses", free, "error", err)
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
