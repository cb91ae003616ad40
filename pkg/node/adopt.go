package node

import (
	"context"
	"errors"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// adopt attaches pods that have an interface and no record: they came before the plugin was chained, or while it was not, or
// their record was lost. It tells how many.
//
// An address that another attachment holds is not taken from it: what the cache says of it may be of a pod that is no more.
func (a *Agent) adopt(ctx context.Context) (adopted int) {
	requests, err := a.Cache.Attachments()
	if err != nil {
		a.Log.Warn("cached attachments that cannot be read", "error", err)
	}
	for _, r := range requests {
		if _, err := a.records().Get(r.ContainerID, r.IfName); err == nil {
			continue // else there is none, or it cannot be read, and a new one takes its place
		}
		id := attachment.ID(r.ContainerID, r.IfName)
		if why := a.adoptOne(ctx, r); why != nil {
			a.Log.Warn("a pod was not adopted: it is refused until it is recreated", "attachment", id,
				"namespace", r.Pod.Namespace, "pod", r.Pod.Name, "why", why)
			continue
		}
		a.Log.Info("adopted a pod", "attachment", id, "namespace", r.Pod.Namespace, "pod", r.Pod.Name, "addresses", r.IPs)
		adopted++
	}
	return adopted
}

func (a *Agent) adoptOne(ctx context.Context, r Request) error {
	for _, ip := range r.IPs {
		if holder, err := a.records().Holder(ip); err == nil {
			return errors.New("its address is held by " + holder.ID())
		}
	}
	_, err := a.Attach(ctx, r)
	return err
}
