package main

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// plugin is the CNI callbacks' seam to the node.
type plugin struct {
	findLink func(netnsPath, ifName string) (*hostlink.Link, error)
	nodeIP   func(hostlink.Family) (netip.Addr, error)
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
// where the node has none to redirect it to.
func baseOf(r *attachment.Record, metadata func(netip.Addr) netip.AddrPort, guard bool) redirect.Base {
	base := redirect.Base{Guard: guard}
	seen := make(map[netip.AddrPort]bool)
	want := func(m netip.AddrPort) {
		if !seen[m] {
			seen[m] = true
			base.Metadata = append(base.Metadata, m)
		}
	}
	for _, one := range r.Redirects {
		want(one.Metadata)
	}
	if guard {
		for _, ip := range r.IPs {
			want(metadata(ip))
		}
	}
	return base
}
