// Package redirect keeps the rules that send a pod's metadata requests to the proxy, and the guard that refuses those of
// everybody else.
//
// For each attachment there is one redirection per address, which matches the attachment's own host side and its own source
// address and carries the attachment's identity as comment. It stands in one place whose name never changes, so that it is
// found whatever version or configuration made it.
//
// For the node there is the base: what the redirections hang on, and the guard; where nothing is redirected, the guard alone.
// A packet that is not redirected keeps the metadata service's address as its destination. The guard refuses it in forward, and
// in postrouting unless its source is one of the host's own addresses. A redirected packet has another destination by then.
//
// Rules are programmed by one of two backends: the node's iptables in either form, or nftables by netlink. On bridges both
// use the same table of the bridge family (see ports.go), which binds addresses to ports in both directions.
package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// Form is the way in which rules were programmed. What is programmed in one, the others neither see nor remove.
type Form string

const (
	// NFT and Legacy are the two ways in which an iptables command talks to the kernel.
	NFT    Form = "iptables-nft"
	Legacy Form = "iptables-legacy"
	// NFTables is netlink, without a command.
	NFTables Form = "nftables"
)

// ErrBusy is the error of a change that could not have the xtables lock, or another of the kernel's resources, in time:
// trying again later may help.
var ErrBusy = errors.New("the packet filter is busy")

// ErrUnsupported is the error of a kernel that lacks what a rule needs.
var ErrUnsupported = errors.New("the kernel does not support it")

// Redirection sends what Source sends to Metadata to Proxy instead. All three are of one family.
type Redirection struct {
	Source          netip.Addr
	Metadata, Proxy netip.AddrPort
}

// Attachment is what is wanted for one interface of one container.
type Attachment struct {
	// ID is the attachment's identity. It holds no white space and no quotes.
	ID string
	// HostLink is the interface on the host by which the packets enter; Bridged says that it is the port of a bridge, where
	// the IP layer sees the bridge instead.
	HostLink string
	Bridged  bool
	// Mark is for iptables on a bridge whose packets it does not see with their port: the mark that the bridge family sets
	// on them. It is 0 where bridge-nf tells the port.
	Mark uint32
	// Netns is the path of the pod's network namespace where the redirection is made inside it, for want of a place on the
	// host that the packets pass; empty otherwise.
	Netns        string
	Redirections []Redirection
}

// Base is what is wanted of the node before any attachment's rule is added.
type Base struct {
	// Metadata are the services that pods must not reach, one of a family at most. What redirections hang on is wanted for
	// those of them that the attachment has a redirection of.
	Metadata []netip.AddrPort
	// Guard tells whether the guard is wanted. It is never removed.
	Guard bool
	// Guarded are the services of all families that are to be guarded, whoever is redirected: in nftables whatever the
	// backend, which a flush of iptables does not remove, and by iptables where the kernel has no nftables.
	Guarded []netip.AddrPort
	// Mark is one bit or several that are set on a bridged packet between the bridge and its redirection.
	Mark uint32
}

// Backend programs rules in one form.
type Backend interface {
	// Form is the form that the rules are in.
	Form() Form
	// Open tells whether Add could begin: the attachment can be matched, and there is what each family of the base needs.
	// It runs nothing and changes nothing. The error is ErrNoIPTables or ErrUnsupported where something is lacking.
	Open(base Base, a Attachment) error
	// Add makes the attachment's rules, and the base where it is missing. Where there is an error, some of the rules may
	// stand. An error that is ErrBusy may pass.
	Add(ctx context.Context, base Base, a Attachment) error
	// Missing names what is wanted and not there. It changes nothing.
	Missing(base Base, a Attachment) ([]string, error)
	// remove deletes the attachment's rules, and returns the redirections that it found none of. What it could not delete
	// is in the error; it goes on with the rest.
	remove(a Attachment) (absent []Redirection, err error)
	// removeLeftovers deletes every rule that carries an identity. Nothing to remove is no error.
	removeLeftovers(id string) error
}

// redirects are the attachment's redirections of one service.
func (a Attachment) redirects(metadata netip.AddrPort) []Redirection {
	var some []Redirection
	for _, r := range a.Redirections {
		if r.Metadata == metadata {
			some = append(some, r)
		}
	}
	return some
}

// validate refuses what iptables would read as something else, and what no comment can hold.
func (a Attachment) validate() error {
	if !isWord(a.HostLink) || len(a.HostLink) >= unix.IFNAMSIZ {
		return fmt.Errorf("host interface %.80q: not a plain name of 1 to 15 bytes", a.HostLink)
	}
	if strings.HasSuffix(a.HostLink, "+") || strings.HasPrefix(a.HostLink, "-") || strings.HasPrefix(a.HostLink, "!") {
		// "cali+" is a name that Linux allows, and to iptables it is every interface that begins with "cali".
		return fmt.Errorf("host interface %q: a name that iptables takes for a pattern or an option", a.HostLink)
	}
	return a.validateID()
}

func (a Attachment) validateID() error {
	if !isWord(a.ID) || len(a.ID) > 250 {
		return fmt.Errorf("attachment %.80q: not an identity of 1 to 250 plain bytes", a.ID)
	}
	return nil
}

func (r Redirection) String() string {
	return fmt.Sprintf("redirection of %s to %s", r.Source, r.Proxy)
}
