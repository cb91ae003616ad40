package imds

import (
	"errors"
	"net/netip"
	"time"

	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

const (
	// requestBurst is how many requests a source may make at once: three hundred processes that start together make three each.
	requestBurst = 1000
	// maxRequestWait is how long a request waits for its turn. SDKs give up after a second.
	maxRequestWait = time.Second
)

var errRequests = errors.New("it makes more requests than it may")

func newRequestLimit(perSecond float64) *ratelimit.Keyed[netip.Addr] {
	if perSecond == 0 {
		return ratelimit.NewKeyed[netip.Addr](rate.Inf, 0)
	}
	return ratelimit.NewKeyed[netip.Addr](rate.Limit(perSecond), requestBurst)
}

// admit waits for the source's turn to make one more request. It returns false after maxRequestWait where the turn comes later.
//
// It waits because an answer of 503 costs the node as much as any other: a source that is slowed down makes as many requests as it has
// connections, and no more. It waits even if the client hangs up, because until then the connection counts as the source's.
func (h *Handler) admit(source netip.Addr) bool {
	wait, ok := h.requests.Reserve(source, time.Now(), maxRequestWait)
	if wait > 0 {
		h.delayed()
		time.Sleep(wait)
	}
	return ok
}
