package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// plugin is the CNI callbacks' seam to the node.
type plugin struct {
	findLink func(netnsPath, ifName string) (*hostlink.Link, error)
	nodeIP   func(hostlink.Family) (netip.Addr, error)
	forwards func(hostlink.Family) bool
	dirs     []string // of the iptables commands
	now      func() time.Time
	stdout   io.Writer
	log      *slog.Logger // on standard error, which runtimes log
}

// iptables is the node's, with what a state directory remembers of it.
func (p *plugin) iptables(stateDir string) *redirect.Node {
	return &redirect.Node{
		Dirs:   p.dirs,
		Choice: filepath.Join(stateDir, "iptables"),
		Lock: func(ctx context.Context) (func(), error) {
			return attachment.Lock(ctx, filepath.Join(stateDir, "base.lock"))
		},
	}
}

// rulesOf is what a record says was programmed.
func rulesOf(r *attachment.Record) redirect.Attachment {
	a := redirect.Attachment{ID: r.ID(), HostLink: r.HostLink.Name, Bridged: r.Path == attachment.PathBridged}
	for _, one := range r.Redirects {
		a.Redirections = append(a.Redirections, redirect.Redirection(one))
	}
	return a
}

// baseOf is what the node needs before a record's rules: the guard for each family that the pod has an address of, also
// where the node has none to redirect it to, and for the other family wherever the node forwards it: a pod with NET_ADMIN
// gives itself an address that no record has, and a later plugin of the chain gives it one of which this one is not told.
// Where the node has no command for that family, it does without that one.
func (p *plugin) baseOf(r *attachment.Record, conf *netconf.Config, has func(netip.Addr) error) redirect.Base {
	base := redirect.Base{Guard: conf.Guard}
	want := func(m netip.AddrPort) {
		if !slices.Contains(base.Metadata, m) {
			base.Metadata = append(base.Metadata, m)
		}
	}
	for _, one := range r.Redirects {
		want(one.Metadata)
	}
	if !conf.Guard {
		return base
	}
	for _, ip := range r.IPs {
		want(metadataFor(conf)(ip))
	}
	for family, ip := range map[hostlink.Family]netip.Addr{hostlink.IPv4: conf.MetadataIP, hostlink.IPv6: metadata6} {
		forwarded := netip.AddrPortFrom(ip, metadataPort)
		if slices.Contains(base.Metadata, forwarded) || !p.forwards(family) {
			continue
		}
		if err := has(ip); errors.Is(err, redirect.ErrNoIPTables) {
			p.log.Warn("the node forwards a family that it has no guard for; a pod with an address of it is not refused",
				"metadata", forwarded, "error", err)
			continue
		}
		want(forwarded)
	}
	return base
}
