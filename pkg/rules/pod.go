package rules

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/podnetns"
)

// The redirection of datapath "pod" is inside the pod's own network namespace, for an interface
// whose packets the host's rules do not see. It translates the pod's output. A pod with NET_ADMIN
// can remove it, and then has no credentials. It protects no other pod: the guard does.

// podTimeout bounds each read and each transaction in a pod's namespace: a pod with NET_ADMIN can
// fill its tables without limit. The bound is far above what a busy node needs, because a pod that
// the node starts late must not fail for it.
const podTimeout = 2 * time.Second

func (f *family) podMap() *nftables.Set {
	return newMap(f.ipTable(), "pod", f.addrType, f.socketType(), false)
}

// podRedirection returns the ruleset inside the pod of a record.
func podRedirection(r *attachment.Record) nft.Ruleset {
	var rs nft.Ruleset
	for _, f := range []*family{ipv4, ipv6} {
		services := redirectedServices([]*attachment.Record{r}, f)
		if len(services) == 0 {
			continue
		}
		t, metadata := f.ipTable(), f.metadataSet()
		rs.Tables = append(rs.Tables, nft.Table{Table: t, Sets: []*nftables.Set{metadata, f.podMap()}, Chains: []nft.Chain{
			newChain(t, "redirections", nftables.ChainTypeNAT, nftables.ChainHookOutput, redirectPriority, nft.Rule{
				Comment: "in the pod", Exprs: slices.Concat(f.matchDestination(metadata), f.translate(f.podMap(), f.loadAddr(f.saddr, register0)))}),
		}})
		rs.Elements = append(rs.Elements, serviceElements(services, f, metadata)...)
	}
	rs.Elements = append(rs.Elements, podElements(r)...)
	return rs
}

func podElements(r *attachment.Record) []nft.Element {
	var elements []nft.Element
	for _, redirect := range r.Redirects {
		elements = append(elements, nft.Element{
			Set: familyOf(redirect.Source).podMap(), Key: addrBytes(redirect.Source), Value: socketBytes(redirect.Proxy),
			Owner: r.ID(), Object: fmt.Sprintf("redirection of %s to %s", redirect.Source, redirect.Proxy),
		})
	}
	return elements
}

// AttachPod makes the redirections of a record inside its pod. It needs nftables in the kernel.
func (n *Node) AttachPod(ctx context.Context, r *attachment.Record) error {
	_, err := applyInPod(ctx, r, podRedirection(r), nil, false)
	return err
}

// CheckPod returns what AttachPod would change.
func (n *Node) CheckPod(ctx context.Context, r *attachment.Record) ([]nft.Change, error) {
	return applyInPod(ctx, r, podRedirection(r), nil, true)
}

// DetachPod removes the redirections inside the pod. An error is harmless: the rules there concern
// no other pod, and end with the namespace.
func (n *Node) DetachPod(ctx context.Context, r *attachment.Record) error {
	_, err := applyInPod(ctx, r, nft.Ruleset{}, podElements(r), false)
	return err
}

func applyInPod(ctx context.Context, r *attachment.Record, desired nft.Ruleset, former []nft.Element, dryRun bool) (changes []nft.Change, err error) {
	apply := func(options ...nft.Option) error {
		conn, err := nft.Open(options...)
		if err != nil {
			return err
		}
		defer conn.Close()
		changes, err = conn.Apply(ctx, desired, former, dryRun)
		return err
	}
	pod, err := podnetns.Open(r.Netns)
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	inPod := nft.InNetns(pod, podTimeout)
	if err = apply(inPod); errors.Is(err, os.ErrDeadlineExceeded) {
		// The kernel loads modules for the first such rule after a boot, which takes longer. Rules in a
		// new namespace, which no pod can fill, load all of them.
		if err := inNewNetns(func() error { return apply() }); err != nil {
			return nil, fmt.Errorf("a new network namespace: %w", err)
		}
		err = apply(inPod)
	}
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", r.Netns, err)
	}
	return changes, nil
}

// inNewNetns calls do on a thread with a new network namespace, which ends with do.
func inNewNetns(do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // without an unlock the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- do()
	}()
	return <-done
}
