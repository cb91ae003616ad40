package node

import (
	"context"
	"errors"
	"fmt"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// adopt attaches pods that have an interface and no record: they came before the plugin was chained, or while it was not, or
// their record was lost. It tells how many.
//
// An address that another attachment holds is not taken from it: what the cache says of it may be of a pod that is no more.
func (a *Agent) adopt(ctx context.Context) (adopted int) {
	records, err := a.records().List()
	if err != nil && records == nil {
		return 0 // who is attached is not known; repair has said so
	}
	requests, err := a.Cache.Attachments(records)
	if err != nil {
		a.Log.Warn("cached attachments that are not adopted", "error", err)
	}
	for _, r := range requests {
		id := attachment.ID(r.ContainerID, r.IfName)
		if why := a.adoptOne(ctx, r); why != nil {
			a.Log.Warn("a pod was not adopted: it is refused, and each round tries again", "attachment", id,
				"namespace", r.Pod.Namespace, "pod", r.Pod.Name, "why", why)
			continue
		}
		a.Log.Info("adopted a pod", "attachment", id, "namespace", r.Pod.Namespace, "pod", r.Pod.Name, "addresses", r.IPs)
		adopted++
	}
	return adopted
}

// adoptOne attaches a pod. If the redirection inside the pod fails, the record and the guard stay, and the next round makes it.
func (a *Agent) adoptOne(ctx context.Context, r cached) error {
	p, err := a.prepare(r.Request)
	if err != nil {
		return err
	}
	// Again, for the pod may have replaced its interface since the look at the cache.
	if err := r.checkHostLink(p.HostLink.Name); err != nil {
		return err
	}
	if err := a.adoptPrepared(ctx, p); err != nil {
		return err
	}
	return a.redirectInPod(p.Record)
}

// adoptPrepared attaches a pod if, under the exclusive lock, nothing contradicts it: since the look at the cache, the pod's DEL
// may have come, or an ADD that got its address.
func (a *Agent) adoptPrepared(ctx context.Context, p *prepared) error {
	unlock, err := a.exclusive(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := a.records().Get(p.ContainerID, p.IfName); err == nil {
		return errors.New("it was attached in the meantime")
	}
	for _, ip := range p.IPs {
		if holder, err := a.records().Holder(ip); err == nil {
			return errors.New("its address is held by " + holder.ID())
		}
	}
	if err := a.stands(p.Record); err != nil {
		return err
	}
	return a.attachRunning(ctx, p)
}

// stands returns an error if the host link of a record is no more. An attachment without a host link is not looked for, because
// that is inside the pod and callers hold the exclusive lock: prepare has just found the interface. If the pod ended since, the
// record is one whose DEL never came: the next round collects it, an ADD that gets its address takes it over, and no pod is served by it
// because the API no longer has the pod that it names.
func (a *Agent) stands(r *attachment.Record) error {
	if r.HostLink.Index == 0 {
		return nil
	}
	links, err := a.Links()
	if err == nil && links[r.HostLink.Index] != r.HostLink.Name {
		err = fmt.Errorf("its interface %s is gone", r.IfName)
	}
	return err
}
