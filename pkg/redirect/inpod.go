package redirect

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// inPod is the redirection in a pod's own network namespace, for an interface whose packets the host's rules do not see. It
// stands in the pod's output, so a pod with NET_ADMIN can take it away: it is a help to a pod that wants its credentials, and
// no boundary for one that wants others'.
type inPod struct{ *nft }

func (f *family) own() *nftables.Set {
	return mapping(f.ipTable(), "own", f.addr, f.socket(), false)
}

func (p *inPod) tables(base Base) []table {
	var tables []table
	for _, f := range base.families() {
		t, services := f.ipTable(), f.ipServices()
		tables = append(tables, table{Table: t, sets: []*nftables.Set{services, f.own()}, chains: []chain{
			hooked(t, "redirections", nftables.ChainTypeNAT, nftables.ChainHookOutput, redirectPriority,
				nftRule{"in the pod", slices.Concat(f.toService(services), f.dnat(f.own(), f.load(f.saddr, reg0)))}),
		}})
	}
	return tables
}

func (p *inPod) elements(base Base, a Attachment) []element {
	elements := base.elements((*family).ipServices)
	for _, r := range a.Redirections {
		elements = append(elements, element{familyOf(r.Source).own(), nftables.SetElement{Key: addrBytes(r.Source), Val: socketBytes(r.Proxy), Comment: a.ID}})
	}
	return elements
}

// podBase is what of a base concerns an attachment inside its pod: there is no guard, and nothing that others ask.
func podBase(a Attachment) Base { return Base{Metadata: a.services()} }

// Guard makes the guard of base.Guarded and nothing else. It takes nftables in the kernel, as AddInPod does.
func (n *Node) Guard(base Base) error {
	return n.bridges().add(Base{Guarded: base.Guarded}, Attachment{})
}

// MissingGuard names what Guard would make.
func (n *Node) MissingGuard(base Base) ([]string, error) {
	return n.bridges().missing(guards(base.Guarded), guarded(base.Guarded))
}

// AddInPod makes the attachment's redirections inside its pod. It takes nftables in the kernel; the error is ErrUnsupported
// without it.
func (n *Node) AddInPod(a Attachment) error {
	return n.within(a, func(p *inPod) error {
		base := podBase(a)
		return p.replace(p.tables(base), p.elements(base, a), a.ID)
	})
}

// MissingInPod names what is wanted inside the pod and not there.
func (n *Node) MissingInPod(a Attachment) (missing []string, err error) {
	err = n.within(a, func(p *inPod) error {
		base := podBase(a)
		missing, err = p.missing(p.tables(base), p.elements(base, a))
		return err
	})
	return missing, err
}

// removeInPod removes the redirections inside the pod, as far as the pod lets it: what stays there concerns nobody else, and
// ends with the namespace.
func (n *Node) removeInPod(a Attachment) error {
	n.within(a, func(p *inPod) error { return p.removeLeftovers(a.ID) })
	return nil
}

func (n *Node) within(a Attachment, do func(*inPod) error) error {
	if err := a.validateID(); err != nil {
		return err
	}
	in := func(netns string) error {
		p := &inPod{&nft{netns: netns}} // no lock of the node for what a pod has in its hand
		defer p.close()
		return do(p)
	}
	err := in(a.Netns)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// The kernel may have loaded modules in that time, as for the first pod after a boot. The same in a namespace without
		// any rules loads them all.
		if err := inNewNetns(func() error { return in("") }); err != nil {
			return fmt.Errorf("a new network namespace: %w", err)
		}
		err = in(a.Netns)
	}
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", a.Netns, err)
	}
	return nil
}

// inNewNetns calls do on a thread of a new network namespace, which ends with do.
func inNewNetns(do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- do()
	}()
	return <-done
}
