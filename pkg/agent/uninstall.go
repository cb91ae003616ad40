package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Uninstall removes all rules from the node, the guard included, and then the state directory. It
// returns how many attachments there were. Missing rules and records are no error. The plugin must
// no longer be chained. Uninstall waits for running ADDs; a second call removes what an ADD made
// that ended later.
func Uninstall(ctx context.Context, n *attach.Node) (attachments int, err error) {
	if _, err := os.Stat(n.StateDir); errors.Is(err, fs.ErrNotExist) {
		return 0, n.Rules.Uninstall(ctx)
	}
	unlock, err := n.Records.LockExclusive(ctx)
	if err != nil {
		return 0, err
	}
	defer unlock()
	s, err := n.Records.Read()
	if err != nil {
		return 0, err
	}
	for _, r := range s.Records { // the rules of unreadable records go with all others
		if r.Datapath == attachment.DatapathPod {
			n.Rules.DetachPod(ctx, r) // an error is harmless
		}
	}
	if err := n.Rules.Uninstall(ctx); err != nil {
		return 0, err
	}
	return len(s.Records), removeAll(n.StateDir)
}

// removeAll removes a directory. A mount point stays, empty.
func removeAll(dir string) error {
	entries, err := os.ReadDir(dir)
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
