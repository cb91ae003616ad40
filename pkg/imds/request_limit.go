package imds

import (
	"net/netip"
	"time"

	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

const (
	// requestBurst is how many requests a source may make in one burst. It serves 300 processes
	// that start together and make three requests each.
	requestBurst = 1000
	// maxRequestWait is how long a request waits for its token. SDKs give up after a second.
	maxRequestWait = time.Second
)

func newRequestLimit(perSecond float64) *ratelimit.Keyed[netip.Addr] {
	if perSecond == 0 {
		return ratelimit.NewKeyed[netip.Addr](rate.Inf, 0)
	}
	return ratelimit.NewKeyed[netip.Addr](rate.Limit(perSecond), requestBurst)
}

// reserveFirst takes the token of the first request of c. A new connection costs this token because
// net/http answers malformed requests itself. It returns false if the source has no token within
// maxRequestWait.
func (c *conn) reserveFirst(now time.Time) bool {
	wait, ok := c.listener.connections.requests.Reserve(c.source, now, maxRequestWait)
	c.firstToken = now.Add(wait)
	return ok
}

// reserve returns how long the next request of c must wait for its token. If the source has no
// token within maxRequestWait, it returns maxRequestWait and false.
func (c *conn) reserve(now time.Time) (wait time.Duration, ok bool) {
	if first := c.firstToken; !first.IsZero() {
		c.firstToken = time.Time{}
		return max(0, first.Sub(now)), true
	}
	return c.listener.connections.requests.Reserve(c.source, now, maxRequestWait)
}

// admit waits for the token of one more request of c. It waits maxRequestWait and returns false if
// there is none by then.
//
// Refusing costs as much as answering, so waiting is the only brake: each connection carries at
// most one waiting request. Hanging up does not end the wait. Otherwise a client could free the
// connection's place early.
func (h *Handler) admit(c *conn) bool {
	wait, ok := c.reserve(time.Now())
	if wait > 0 {
		h.Delayed()
		time.Sleep(wait)
	}
	return ok
}
