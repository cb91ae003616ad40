// Package attach attaches pods on this node (ADD), detaches them (DEL, GC) and checks them (CHECK).
// An attachment is its record and its rules.
package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/sockdiag"
)

// Settings configure attachments. They come from a validated network configuration.
type Settings struct {
	// ProxyIP is the destination of redirected connections. The zero Addr means the node's own
	// address towards its default route, of the family of the pod's address.
	ProxyIP    netip.Addr
	ProxyPort  uint16
	MetadataIP netip.Addr // an IPv4 address
	StateDir   string
	Backend    string // "auto" or an attachment.Backend
	Guard      bool
	Mark       uint32 // not 0
	// PodDatapath selects attachment.DatapathPod for every pod.
	PodDatapath bool
}

// SettingsOf returns the settings of a network configuration.
func SettingsOf(c *netconf.Config) Settings {
	return Settings{
		ProxyIP: c.ProxyIP, ProxyPort: c.ProxyPort, MetadataIP: c.MetadataIP, StateDir: c.StateDir,
		Backend: cmp.Or(string(c.Backend), "auto"), Guard: c.Guard, Mark: c.Mark, PodDatapath: c.Datapath == attachment.DatapathPod,
	}
}

// System is the seam to the operating system.
type System struct {
	FindLink     func(netnsPath, ifName string) (*hostlink.Link, error)
	NodeIP       func(ipfamily.Family) (netip.Addr, error)
	HasIPv6      func() bool
	IPTablesDirs []string
	Now          func() time.Time
	// DestroySockets is sockdiag.Destroy.
	DestroySockets func(ports []uint16, peers []netip.Addr) (wait func() (int, error))
	// DropQueued is hostlink.DropQueued.
	DropQueued func(ip netip.Addr) error
}

// Host returns the host's operating system.
func Host() System {
	return System{
		FindLink: hostlink.Find, NodeIP: hostlink.NodeIP, HasIPv6: ipfamily.HasIPv6, IPTablesDirs: rules.IPTablesDirs(), Now: time.Now,
		DestroySockets: sockdiag.Destroy, DropQueued: hostlink.DropQueued,
	}
}

// Node is this node with one configuration. It is not safe for concurrent use.
type Node struct {
	Settings
	System
	Records attachment.Dir
	Rules   *rules.Node
	log     *slog.Logger
}

// New returns the node.
func New(s Settings, sys System, log *slog.Logger) *Node {
	return &Node{
		Settings: s, System: sys, Records: attachment.In(s.StateDir), log: log,
		Rules: rules.New(rules.Settings{MetadataIP: s.MetadataIP, IPv6: sys.HasIPv6(), Guard: s.Guard, Mark: s.Mark}, sys.IPTablesDirs, log),
	}
}

// Close closes the netlink connection of the rules. After a deletion it blocks for some 20 ms
// (rules.Node.Close), so callers hold no lock.
func (n *Node) Close() { n.Rules.Close() }

// Metadata returns the metadata service that a pod with the address ip dials.
func (n *Node) Metadata(ip netip.Addr) netip.AddrPort {
	if ipfamily.Of(ip) == ipfamily.IPv6 {
		return netip.AddrPortFrom(attachment.MetadataIPv6, attachment.MetadataPort)
	}
	return netip.AddrPortFrom(n.MetadataIP, attachment.MetadataPort)
}

// Attach records the pod as the holder of its addresses and redirects its metadata requests. It
// needs the node's kernel and file system only. After an error the attachment has neither rules nor
// a record; the error is an *Error.
//
// The record is written before the rules. If the process is killed between the two, a later ADD,
// DEL or round of the agent finds the rules by the record.
func (n *Node) Attach(ctx context.Context, req Request) (*attachment.Record, error) {
	r, err := n.NewRecord(ctx, req)
	if err != nil {
		return nil, err
	}
	unlock, err := n.Records.LockAdd(ctx, r)
	if err != nil {
		return nil, wrap(KindState, err)
	}
	defer unlock()
	if err := n.removeStaleHolders(ctx, r); err != nil {
		return nil, err
	}
	former, err := n.earlierRecord(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := n.Records.Put(r); err != nil {
		return nil, wrap(KindState, err)
	}
	wait := n.destroySockets(r)
	err = wrap(KindRules, n.makeRules(ctx, r, former))
	if failed := wait(); err == nil {
		err = wrap(KindState, failed)
	}
	if err != nil {
		n.undo(context.WithoutCancel(ctx), r, former)
		return nil, err
	}
	return r, nil
}

func (n *Node) makeRules(ctx context.Context, r, former *attachment.Record) error {
	if former != nil && former.Datapath == attachment.DatapathPod {
		n.Rules.DetachPod(ctx, former) // an error is harmless, as that of tearDown
	}
	if err := n.Rules.Attach(ctx, r, former); err != nil {
		return err
	}
	if r.Datapath != attachment.DatapathPod {
		return nil
	}
	return n.Rules.AttachPod(ctx, r)
}

// undo removes what a failed ADD made. What cannot be removed stays on record, for the DEL that the
// runtime sends after a failed ADD.
func (n *Node) undo(ctx context.Context, r, former *attachment.Record) {
	var err error
	if former != nil {
		err = n.Rules.Detach(ctx, former)
	}
	if err == nil {
		err = n.tearDown(ctx, r)
	}
	if err != nil {
		n.log.Error("failed ADD could not be undone", "attachment", r.ID(), "error", err)
	}
}

// removeStaleHolders tears down other attachments that hold one of the record's addresses: an
// address has one holder, so their DEL never came.
func (n *Node) removeStaleHolders(ctx context.Context, r *attachment.Record) error {
	for _, ip := range r.IPs {
		holder, err := n.Records.Holder(ip)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			// Put takes the address from it. Its rule matches this address on another interface.
			n.log.Warn("record of the address's former holder cannot be read", "ip", ip, "error", err)
			continue
		}
		if holder.ID() == r.ID() {
			continue
		}
		n.log.Warn("address is reused without a DEL; tearing its former holder down", "ip", ip, "holder", holder.ID(),
			"namespace", holder.Pod.Namespace, "pod", holder.Pod.Name)
		if err := n.tearDown(ctx, holder); err != nil {
			return wrap(KindRules, err)
		}
	}
	return nil
}

// earlierRecord returns the record of an earlier ADD of the attachment, or nil. It removes the
// rules of one that cannot be read.
func (n *Node) earlierRecord(ctx context.Context, r *attachment.Record) (*attachment.Record, error) {
	former, err := n.Records.Get(r.ContainerID, r.IfName)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return former, nil
	}
	n.log.Warn("record cannot be read; removing rules by their owner", "attachment", r.ID(), "error", err)
	_, err = n.Rules.DetachID(ctx, r.ID(), false)
	return nil, wrap(KindRules, err)
}

// Check compares the record with the container's interface and addresses, and the rules with the
// record. It changes nothing and returns all differences. An error means that they are unknown.
func (n *Node) Check(ctx context.Context, req Request) ([]string, error) {
	r, err := n.Records.Get(req.ContainerID, req.IfName)
	if errors.Is(err, fs.ErrNotExist) {
		return []string{"no record"}, nil
	}
	if err != nil {
		return nil, wrap(KindState, err)
	}
	link, datapath, err := n.findLink(req)
	if err != nil {
		return nil, err
	}
	ips, err := addressesOf(req, link)
	if err != nil {
		return nil, err
	}
	differences := compare(r, link, datapath, ips)
	changes, err := n.Rules.Check(ctx, r)
	if err == nil && r.Datapath == attachment.DatapathPod {
		var inPod []rules.Change
		inPod, err = n.Rules.CheckPod(ctx, r)
		changes = append(changes, inPod...)
	}
	if err != nil {
		return nil, wrap(KindRules, err)
	}
	for _, c := range changes {
		differences = append(differences, c.String())
	}
	return differences, nil
}

// CheckUsable returns an error if no Attach can succeed. It changes nothing.
func (n *Node) CheckUsable(ctx context.Context) error {
	if _, err := n.Rules.ChooseBackend(ctx, n.Backend); err != nil {
		return err
	}
	if n.ProxyIP.IsValid() {
		return nil
	}
	_, err := n.NodeIP(ipfamily.IPv4)
	if err == nil {
		return nil
	}
	_, err6 := n.NodeIP(ipfamily.IPv6)
	if err6 == nil {
		return nil
	}
	return fmt.Errorf("proxyIP: %w; %w", err, err6)
}
