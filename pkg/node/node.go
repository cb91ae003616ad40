// Package node attaches and detaches pods on this node, and keeps what it attached as it should be.
//
// The CNI plugin attaches and detaches by Node, one process for each. The agent (Agent) lives on the node: it adopts pods
// that came before the plugin, makes again what somebody flushed, and collects what no DEL came for.
package node

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/sockdiag"
)

// metadata6 is the service's IPv6 address (Amazon EC2 User Guide, "Access instance metadata"), which no configuration
// changes. Both addresses are served on port 80.
var metadata6 = netip.MustParseAddr("fd00:ec2::254")

const metadataPort = 80

// Settings are what a configuration says. They are valid: whoever reads them has seen to it.
type Settings struct {
	// ProxyIP is where redirected connections go; the zero Addr is the node's own address towards its default route, of the
	// family at hand.
	ProxyIP    netip.Addr
	ProxyPort  uint16
	MetadataIP netip.Addr // an IPv4 address
	StateDir   string
	Backend    string // "auto", "iptables", or a redirect.Form
	Guard      bool
	Mark       uint32 // never 0
	// InPod has each redirection made inside the pod.
	InPod bool
}

// System is the seam to the operating system.
type System struct {
	FindLink func(netnsPath, ifName string) (*hostlink.Link, error)
	NodeIP   func(hostlink.Family) (netip.Addr, error)
	Has      func(hostlink.Family) bool
	BridgeNF func(bridge string) (hostlink.BridgeNF, error)
	Dirs     []string // of the iptables commands
	Now      func() time.Time
	// DestroySockets begins to destroy the host's TCP sockets by local port and peer (sockdiag.Destroy).
	DestroySockets func(ports []uint16, peers []netip.Addr) (wait func() (int, error))
	// DropQueued drops packets that wait for the link-layer address of ip (hostlink.DropQueued).
	DropQueued func(ip netip.Addr) error
}

// Host is the operating system.
func Host() System {
	return System{
		FindLink: hostlink.Find, NodeIP: hostlink.NodeIP, Has: hostlink.Has, BridgeNF: hostlink.BridgeNFOf, Dirs: redirect.Dirs(), Now: time.Now,
		DestroySockets: sockdiag.Destroy, DropQueued: hostlink.DropQueued,
	}
}

// Node is this node, as one configuration has it. It is not for concurrent use.
type Node struct {
	Settings
	System
	Log *slog.Logger

	rules    *redirect.Node
	addInPod func(redirect.Attachment) error // rules.AddInPod; tests wrap it
}

// New is the node by settings.
func New(s Settings, sys System, log *slog.Logger) *Node {
	n := &Node{Settings: s, System: sys, Log: log}
	n.rules = &redirect.Node{ // whose warnings go by n.Log, which the agent's rounds replace
		Dirs: sys.Dirs,
		Unbound: func(id string, err error) {
			n.Log.Warn("the bridge's answers cannot be bound to their ports: a neighbour with NET_RAW may draw them to itself", "attachment", id, "error", err)
		},
		Unguarded: func(service netip.AddrPort, err error) {
			n.Log.Warn("no guard can be made for a family that no pod has an address of; one that gives itself such an address is not refused", "metadata", service, "error", err)
		},
		Conflict: func(what string) {
			n.Log.Warn(`A NAT rule or chain of another program may run before the redirection and take metadata requests. Set "backend": "nftables" to rule this out.`, "conflict", what)
		},
		Lock: func(ctx context.Context) (func(), error) {
			if n.stateless() { // nothing of ours is being changed, and a DEL leaves no directory behind
				return func() {}, nil
			}
			return attachment.Lock(ctx, n.file("base.lock"))
		},
	}
	n.addInPod = n.rules.AddInPod
	return n
}

// Close lets go of what the node has open.
func (n *Node) Close() { n.rules.Close() }

func (n *Node) file(name string) string { return filepath.Join(n.StateDir, name) }
func (n *Node) records() attachment.Dir { return attachment.In(n.StateDir) }

// Kind is what an error is about.
type Kind int

const (
	// Link is an interface whose packets cannot be matched.
	Link Kind = iota
	// Addresses are a result's that the interface does not hold.
	Addresses
	// ProxyAddress is a node that has no address which pods could dial.
	ProxyAddress
	// Bridge is a bridged pod whose port cannot be told from its neighbours' on this node.
	Bridge
	// Mark is a mark that the node has another use for.
	Mark
	// Rules are rules that could not be programmed; none of the attachment stand.
	Rules
	// State is a record that could not be written or read.
	State
)

// Error is an error and what it is about. Its text is the cause's.
type Error struct {
	Kind Kind
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// about gives an error its kind, and leaves one that has a kind as it is.
func about(kind Kind, err error) error {
	if _, known := errors.AsType[*Error](err); known || err == nil {
		return err
	}
	return &Error{kind, err}
}

// metadataFor is the service that an address's pod would dial.
func (n *Node) metadataFor(ip netip.Addr) netip.AddrPort {
	if ip.Is6() {
		return netip.AddrPortFrom(metadata6, metadataPort)
	}
	return netip.AddrPortFrom(n.MetadataIP, metadataPort)
}

// RulesOf returns the rules that a record says were programmed, and no more: a fuzz target holds it to that.
func RulesOf(r *attachment.Record) redirect.Attachment {
	a := redirect.Attachment{ID: r.ID(), HostLink: r.HostLink.Name, Bridged: r.Datapath == attachment.DatapathBridged, Mark: r.Mark}
	if r.Datapath == attachment.DatapathPod {
		a.Netns = r.Netns
	}
	for _, one := range r.Redirects {
		a.Redirections = append(a.Redirections, redirect.Redirection(one))
	}
	return a
}

// base is what the node needs before the rules of some records: what they hang on, with the guard for each family that a pod
// has an address of, also where the node has none to redirect it to; and a guard for all families of the kernel in any case.
// A pod with NET_ADMIN gives itself an address that no record has, a later plugin of the chain gives it one of which this one
// is not told, and what the node does not forward now it may in a moment.
func (n *Node) base(records ...*attachment.Record) redirect.Base {
	base := redirect.Base{Guard: n.Guard, Mark: n.Mark}
	want := func(m netip.AddrPort) {
		if !slices.ContainsFunc(base.Metadata, func(other netip.AddrPort) bool { return other.Addr().Is6() == m.Addr().Is6() }) {
			base.Metadata = append(base.Metadata, m)
		}
	}
	for _, r := range records {
		for _, one := range r.Redirects {
			if r.Datapath != attachment.DatapathPod {
				want(one.Metadata)
			}
		}
	}
	if !n.Guard {
		return base
	}
	for _, r := range records {
		for _, ip := range r.IPs {
			want(n.metadataFor(ip))
		}
	}
	base.Guarded = []netip.AddrPort{n.metadataFor(n.MetadataIP)}
	if n.Has(hostlink.IPv6) {
		base.Guarded = append(base.Guarded, n.metadataFor(metadata6))
	}
	return base
}

// shared holds off the agent's repairs while the plugin changes rules and records: between the two a record without rules,
// or rules without a record, are no fault. The plugin's calls hold it together.
func (n *Node) shared(ctx context.Context) (func(), error) {
	return n.change(ctx, attachment.LockShared)
}

func (n *Node) change(ctx context.Context, lock func(context.Context, string) (func(), error)) (func(), error) {
	if err := os.MkdirAll(n.StateDir, 0o755); err != nil {
		return nil, about(State, err)
	}
	unlock, err := lock(ctx, n.file("change.lock"))
	return unlock, about(State, err)
}

// stateless tells a node on which nothing was ever attached.
func (n *Node) stateless() bool {
	_, err := os.Stat(n.StateDir)
	return errors.Is(err, fs.ErrNotExist)
}
