package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// adopt attaches pods that have an interface and no record: they were created before the plugin was
// chained, or their record was lost. It returns how many it attached. records are those that exist.
//
// It takes no address from another attachment: the cache can describe a pod that no longer exists.
func (a *Agent) adopt(ctx context.Context, records []*attachment.Record) (adopted int) {
	unattached, err := a.findUnattached(records)
	if err != nil {
		a.log.Warn("cached attachments that are not adopted", "error", err)
	}
	for _, c := range unattached {
		id := attachment.ID(c.ContainerID, c.IfName)
		if err := a.adoptOne(ctx, c); err != nil {
			a.log.Warn("A pod was not adopted: its requests are refused, and each round tries again.", "attachment", id,
				"namespace", c.Pod.Namespace, "pod", c.Pod.Name, "error", err)
			continue
		}
		a.log.Info("adopted a pod", "attachment", id, "namespace", c.Pod.Namespace, "pod", c.Pod.Name, "addresses", c.IPs)
		adopted++
	}
	return adopted
}

// adoptOne attaches a pod. If the redirection inside the pod fails, record and guard stay, and the
// next round makes it.
func (a *Agent) adoptOne(ctx context.Context, c cachedAttachment) error {
	r, err := a.node.NewRecord(ctx, c.Request)
	if err != nil {
		return err
	}
	// The pod can have replaced its interface since the cache was compared.
	if err := c.checkHostSide(r.HostLink.Name); err != nil {
		return err
	}
	if err := a.attachRunning(ctx, r); err != nil {
		return err
	}
	if r.Datapath != attachment.DatapathPod {
		return nil
	}
	return a.attachPod(ctx, r)
}

// attachRunning attaches a running pod on the host unless its DEL, or an ADD that got its address,
// came since the cache was read. Unlike an ADD it destroys none of the pod's sockets, also after an
// error: it is tried again in each round. After an error there is neither a rule nor a record.
func (a *Agent) attachRunning(ctx context.Context, r *attachment.Record) error {
	unlock, err := a.node.Records.LockExclusive(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := a.node.Records.Get(r.ContainerID, r.IfName); err == nil {
		return errors.New("it was attached in the meantime")
	}
	for _, ip := range r.IPs {
		if holder, err := a.node.Records.Holder(ip); err == nil {
			return errors.New("its address is held by " + holder.ID())
		}
	}
	if err := a.checkHostLink(r); err != nil {
		return err
	}
	if err := a.node.Records.Put(r); err != nil {
		return err
	}
	err = a.node.Rules.Attach(ctx, r, nil)
	if err == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	failed := a.node.Rules.Detach(ctx, r)
	if failed == nil {
		failed = a.node.Records.Delete(r.ContainerID, r.IfName)
	}
	if failed != nil {
		a.log.Error("failed adoption could not be undone", "attachment", r.ID(), "error", failed)
	}
	return err
}

// checkHostLink returns an error if the host link of a record does not exist. It does not look for
// an interface without a host link, because that is inside the pod: NewRecord has just found it. If
// the pod has ended since, the next round collects the record, an ADD that gets the address
// replaces it, and no pod is served by it because the API does not have the pod that it names.
func (a *Agent) checkHostLink(r *attachment.Record) error {
	if r.HostLink.Index == 0 {
		return nil
	}
	links, err := a.Links()
	if err == nil && links[r.HostLink.Index] != r.HostLink.Name {
		err = fmt.Errorf("its interface %s is gone", r.IfName)
	}
	return err
}
