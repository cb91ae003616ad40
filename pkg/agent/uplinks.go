package agent

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/uplink"
)

// Uplinks is the guard of the interfaces by which packets leave the node. It is an uplink.Guard.
type Uplinks interface {
	// Reconcile guards all uplinks and returns the names of those that were not guarded.
	Reconcile() ([]string, error)
	Close() error
}

// guardUplinks guards the interfaces by which packets leave the node, or removes that guard if the
// configuration has none. A kernel without what it needs is no error: the guard in netfilter refuses
// what passes netfilter.
func (a *Agent) guardUplinks() error {
	if !a.node.Guard {
		if a.areUplinksRemoved {
			return nil
		}
		// No process would tell that guard the node's new addresses.
		err := a.RemoveUplinks()
		a.areUplinksRemoved = err == nil
		return err
	}
	attached, err := a.reconcileUplinks()
	a.logChanges("guarded uplinks", attached)
	if errors.Is(err, uplink.ErrUnsupported) {
		a.log.Warn("The uplinks are not guarded: a pod whose packets do not pass netfilter reaches the node's role.", "error", err)
		return nil
	}
	return err
}

func (a *Agent) reconcileUplinks() ([]string, error) {
	if a.uplinks == nil {
		guard, err := a.NewUplinks(a.node.MetadataIP)
		if err != nil {
			return nil, err
		}
		a.uplinks = guard
	}
	return a.uplinks.Reconcile()
}

// uplinkDir returns the directory of the pins of the uplinks' guard. It is named by the thread's
// network namespace, as the agent's lock is.
func uplinkDir() (string, error) {
	netns, err := netnsID()
	return fmt.Sprintf("/sys/fs/bpf/kube2iam-cni-%d", netns), err
}

func newUplinks(metadata netip.Addr) (Uplinks, error) {
	dir, err := uplinkDir()
	if err != nil {
		return nil, err
	}
	return uplink.New(metadata, dir)
}

// RemoveUplinks removes the guard of the uplinks from the node.
func RemoveUplinks() error {
	dir, err := uplinkDir()
	if err != nil {
		return err
	}
	return uplink.Remove(dir)
}
