package imds

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// kept are answers of the service that do not change while the instance runs: they are kept for a moment, and of those who ask
// at once one asks the service for all.
type kept struct {
	flights singleflight.Group

	mu      sync.Mutex
	answers map[string]*keptAnswer
}

type keptAnswer struct {
	header http.Header
	body   []byte
	until  time.Time
}

const (
	// keptFor is how long an answer is kept.
	keptFor = time.Minute
	// maxKept bounds one; the largest, the identity document, has half a kilobyte.
	maxKept = 16 << 10
)

// lasting are the paths that are kept, below /latest: other versions have the same, and are asked for by few. The list bounds how
// much is kept.
var lasting = map[string]bool{
	"dynamic/instance-identity/document":       true,
	"meta-data/ami-id":                         true,
	"meta-data/instance-id":                    true,
	"meta-data/instance-life-cycle":            true,
	"meta-data/instance-type":                  true,
	"meta-data/placement/availability-zone":    true,
	"meta-data/placement/availability-zone-id": true,
	"meta-data/placement/region":               true,
	"meta-data/services/domain":                true,
	"meta-data/services/partition":             true,
}

func lasts(path string) bool {
	rest, ok := strings.CutPrefix(path, "/latest/")
	return ok && lasting[strings.TrimSuffix(rest, "/")]
}

// forwardKept asks for an answer to keep, and answers with it. It calls done when the service has been asked, which may be after the
// client has gone: what a pod has set going counts as the pod's until it ends.
func (u *Upstream) forwardKept(w http.ResponseWriter, r *http.Request, done func()) error {
	path := strings.TrimSuffix(r.URL.Path, "/")
	flight := u.kept.flights.DoChan(path, func() (any, error) {
		// An earlier flight may have stored the answer and ended after the caller missed the cache.
		if a := u.kept.get(path, time.Now()); a != nil {
			return a, nil
		}
		// It is everybody's: it must not end because the client that happened to begin it went away.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), upstreamTime)
		defer cancel()
		return u.keep(ctx, path)
	})
	select {
	case <-r.Context().Done():
		go func() {
			<-flight
			done()
		}()
		return r.Context().Err()
	case res := <-flight:
		done()
		if res.Err != nil {
			return failed(path, res.Err)
		}
		res.Val.(*keptAnswer).write(w)
		return nil
	}
}

func (a *keptAnswer) write(w http.ResponseWriter) {
	header := w.Header()
	for name, value := range a.header {
		header[name] = value
	}
	w.Write(a.body)
}

func (k *kept) get(path string, now time.Time) *keptAnswer {
	path = strings.TrimSuffix(path, "/")
	k.mu.Lock()
	defer k.mu.Unlock()
	if a := k.answers[path]; a != nil && now.Before(a.until) {
		return a
	}
	return nil
}

// keep asks for an answer and keeps it. Only a success is kept.
func (u *Upstream) keep(ctx context.Context, path string) (*keptAnswer, error) {
	res, done, err := u.do(ctx, http.MethodGet, path)
	if err != nil {
		return nil, err
	}
	defer done()
	if res.StatusCode != http.StatusOK {
		return nil, strange(res.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxKept+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxKept {
		return nil, fmt.Errorf("more than %d bytes", maxKept)
	}
	a := &keptAnswer{header: make(http.Header), body: body, until: time.Now().Add(keptFor)}
	passOn(a.header, res, int64(len(body)))
	u.kept.mu.Lock()
	defer u.kept.mu.Unlock()
	u.kept.answers[path] = a
	return a, nil
}
