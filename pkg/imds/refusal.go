package imds

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// Refusal is why a request is refused, and how it is answered.
type Refusal struct {
	Status int
	// Code and Message are the fields of the answer's document. If Code is empty, the body is the
	// error page of the status.
	Code, Message string
	// Pod is "<namespace>/<name>", or the address of an unknown pod. If it is empty, the log has
	// the caller's name.
	Pod string
	// Err is the full reason. It is for the log, not for the pod. Nil means that the status
	// explains itself and nothing is logged.
	Err error
}

// Error implements error.
func (r *Refusal) Error() string {
	if r.Err == nil {
		return http.StatusText(r.Status)
	}
	return r.Err.Error()
}

func (r *Refusal) Unwrap() error { return r.Err }

var (
	errNotFound  = &Refusal{Status: http.StatusNotFound}
	errForbidden = &Refusal{Status: http.StatusForbidden}
	errMethod    = &Refusal{Status: http.StatusMethodNotAllowed}
	errTTL       = &Refusal{Status: http.StatusBadRequest}
	errRequests  = unavailable("it makes more requests than it may")
	errNoToken   = &Refusal{Status: http.StatusUnauthorized, Err: errors.New("a request without a session token, where one is required")}
	errBadToken  = &Refusal{Status: http.StatusUnauthorized, Err: errors.New("a session token that has ended, or was not made for the pod that holds the address now")}
)

// unavailable returns a refusal with status 503, after which SDKs retry.
func unavailable(format string, args ...any) *Refusal {
	return &Refusal{Status: http.StatusServiceUnavailable, Err: fmt.Errorf(format, args...)}
}

// A reason is logged once in refusalInterval for a source address, and at most refusalBurst reasons:
// SDKs retry, and a hostile pod may vary its requests to fill the log.
const (
	refusalInterval = 30 * time.Second
	refusalBurst    = 4
)

// refusalLog limits the lines of the log. The reason's limit comes first, so that repeated refusals
// use up nothing of the source's.
type refusalLog struct {
	reasons *ratelimit.Keyed[refusalReason]
	sources *ratelimit.Keyed[netip.Addr]
}

type refusalReason struct {
	source netip.Addr
	reason string
}

func newRefusalLog() refusalLog {
	return refusalLog{
		reasons: ratelimit.NewKeyed[refusalReason](rate.Every(refusalInterval), 1),
		sources: ratelimit.NewKeyed[netip.Addr](rate.Every(refusalInterval/refusalBurst), refusalBurst),
	}
}

func (l refusalLog) allow(source netip.Addr, reason error) bool {
	now := time.Now()
	return l.reasons.Allow(refusalReason{source, reason.Error()}, now) && l.sources.Allow(source, now)
}

// refuse writes, counts and logs the answer to a request that failed with err.
func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, source netip.Addr, caller Caller, err error) {
	if ended := r.Context().Err(); ended != nil && errors.Is(err, ended) {
		writeError(w, http.StatusInternalServerError) // the client disconnected; not counted
		return
	}
	refusal, ok := errors.AsType[*Refusal](err)
	if !ok {
		refusal = &Refusal{Status: http.StatusInternalServerError, Err: err}
	}
	h.Refused(refusal.Status)
	if refusal.Err != nil && h.refusals.allow(source, refusal.Err) {
		h.Log.Warn("pod refused", "pod", cmp.Or(refusal.Pod, caller.Name()), "source", source, "status", refusal.Status, "reason", refusal.Err)
	}
	if refusal.Code == "" {
		writeError(w, refusal.Status)
		return
	}
	writeFailure(w, refusal.Status, refusal.Code, refusal.Message)
}
