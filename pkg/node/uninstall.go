package node

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Uninstall removes all rules of ours from the node, the guard included, and then the state directory, and tells how many attachments there
// were. What is gone already is no error. The plugin must not be chained any more; ADDs that are under way are waited for, and what one
// leaves that began before and ended after is found by calling this again.
func (n *Node) Uninstall(ctx context.Context) (attachments int, err error) {
	services := []netip.AddrPort{n.metadataFor(n.MetadataIP), n.metadataFor(metadata6)}
	if n.stateless() {
		return 0, n.rules.Clear(ctx, services)
	}
	unlock, err := n.change(ctx, attachment.Lock)
	if err != nil {
		return 0, err
	}
	defer unlock()
	records, err := n.records().List()
	if err != nil && records == nil {
		return 0, about(State, err)
	}
	for _, r := range records { // those that cannot be read have rules all the same, which go with the others
		if r.Datapath == attachment.DatapathPod {
			n.remove(r) // as far as the pod lets it
		}
	}
	if err := n.rules.Clear(ctx, services); err != nil {
		return 0, about(Rules, err)
	}
	return len(records), about(State, removeAll(n.StateDir))
}

// removeAll removes a directory; one that something is mounted on stays, empty.
func removeAll(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return nil
}
