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

// responseCache holds responses of the metadata service that do not change while the instance runs.
// Concurrent requests for the same path share one exchange with the service.
type responseCache struct {
	flights singleflight.Group

	mu        sync.Mutex
	responses map[string]*cachedResponse
}

type cachedResponse struct {
	header http.Header
	body   []byte
	until  time.Time
}

const (
	cacheTime = time.Minute
	// maxCachedBody exceeds the largest cacheable response: an identity document has half a kilobyte.
	maxCachedBody = 16 << 10
)

// cacheable lists the cached paths below /latest. Other versions are rarely requested. The list bounds
// the size of the cache.
var cacheable = map[string]bool{
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

func isCacheable(path string) bool {
	rest, ok := strings.CutPrefix(path, "/latest/")
	return ok && cacheable[strings.TrimSuffix(rest, "/")]
}

// get returns the cached response of a path, or nil.
func (c *responseCache) get(path string, now time.Time) *cachedResponse {
	c.mu.Lock()
	defer c.mu.Unlock()
	if res := c.responses[strings.TrimSuffix(path, "/")]; res != nil && now.Before(res.until) {
		return res
	}
	return nil
}

func (c *responseCache) put(path string, res *cachedResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.responses[path] = res
}

func (res *cachedResponse) write(w http.ResponseWriter) {
	header := w.Header()
	for name, value := range res.header {
		header[name] = value
	}
	w.Write(res.body)
}

// forwardCacheable fetches a response, caches it and writes it. It returns only when the exchange has
// ended, even if the client disconnects before, so that the exchange counts against the pod's limit.
func (u *Upstream) forwardCacheable(w http.ResponseWriter, r *http.Request) error {
	path := strings.TrimSuffix(r.URL.Path, "/")
	res, err, _ := u.cache.flights.Do(path, func() (any, error) {
		// An earlier flight may have cached the response after this request missed it.
		if res := u.cache.get(path, time.Now()); res != nil {
			return res, nil
		}
		// Other requests wait for the exchange, so it must not end when this request's client disconnects.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), upstreamTimeout)
		defer cancel()
		return u.fetch(ctx, path)
	})
	if err != nil {
		return upstreamError(path, err)
	}
	res.(*cachedResponse).write(w)
	return nil
}

// fetch requests a path and caches the response. It caches only successes.
func (u *Upstream) fetch(ctx context.Context, path string) (cached *cachedResponse, err error) {
	err = u.do(ctx, http.MethodGet, path, func(res *http.Response) error {
		body, err := io.ReadAll(io.LimitReader(res.Body, maxCachedBody+1))
		if err != nil {
			return err
		}
		if len(body) > maxCachedBody {
			return fmt.Errorf("more than %d bytes", maxCachedBody)
		}
		cached = &cachedResponse{header: make(http.Header), body: body, until: time.Now().Add(cacheTime)}
		copyHeader(cached.header, res, int64(len(body)))
		u.cache.put(path, cached)
		return nil
	})
	return cached, err
}
