package broker

import (
	"context"
	"net/http"
	"net/netip"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
)

// Caller is the client of one request: the pod that had the source address when the request
// arrived.
type Caller struct {
	broker  *Broker
	source  pods.Source
	arrived time.Time
}

// Caller returns the caller at the address.
func (b *Broker) Caller(ip netip.Addr, now time.Time) *Caller {
	return &Caller{broker: b, source: b.Pods.Source(ip), arrived: now}
}

// Identity identifies the current owner of the address, as pods.Source.Identity does.
func (b *Broker) Identity(ip netip.Addr) string { return b.Pods.Source(ip).Identity() }

// Name returns the name of the caller's pod according to its record, or its address.
func (c *Caller) Name() string { return c.source.String() }

// Session returns the identity that session tokens are bound to: the pod's UID, or the address of
// an unknown pod. It needs no API server, so tokens are issued during an outage.
func (c *Caller) Session() string {
	if uid := c.source.Holder(); uid != "" {
		return uid
	}
	return c.source.IP.String()
}

// Role returns the name and the ARN of the pod's role, without a call to STS. The error is a
// *imds.Refusal.
func (c *Caller) Role(ctx context.Context) (name, arn string, err error) {
	a, _, err := c.broker.assumption(ctx, c.source)
	if err != nil {
		return "", "", err
	}
	return a.RoleName(), a.RoleARN, nil
}

// Credentials returns the credentials of the pod's role if that is its name. The error is a
// *imds.Refusal.
func (c *Caller) Credentials(ctx context.Context, role string) (*credentials.Document, error) {
	a, pod, err := c.broker.assumption(ctx, c.source)
	if err != nil {
		return nil, err
	}
	if role != a.RoleName() {
		return nil, &imds.Refusal{Status: http.StatusNotFound, Pod: pod.String(), Err: errOtherRole}
	}
	doc, err := c.broker.Credentials.Get(ctx, string(pod.UID), a)
	if err != nil {
		return nil, refuseCredentials(pod, a, err)
	}
	// If another pod got the address while STS was called, the answer would go to that pod.
	if time.Since(c.arrived) > minAddressReuse && !c.hasAddress(pod) {
		return nil, &imds.Refusal{Status: http.StatusNotFound, Pod: pod.String(), Err: errAddressReused}
	}
	return doc, nil
}

// minAddressReuse is less than any runtime needs to give an address to another pod, which takes
// several processes. A faster answer needs no second check.
const minAddressReuse = 5 * time.Millisecond

// hasAddress reports whether the pod has had the address since the request arrived.
func (c *Caller) hasAddress(pod *pods.Pod) bool {
	now := c.broker.Pods.Source(c.source.IP)
	uid := types.UID(now.Holder())
	return c.source.Same(now) && (uid == "" || uid == pod.UID || uid == pod.Mirror)
}
