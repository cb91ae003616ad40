package imds

import (
	"context"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// responseCache holds responses of the metadata service that do not change while the instance runs.
// Concurrent requests for the same path share one exchange with the service.
type responseCache struct {
	flights   singleflight.Group
	responses sync.Map // of cachedResponse, by path
}

type cachedResponse struct {
	*Response
	until time.Time
}

const cacheTime = time.Minute

// cacheable lists the cached paths below /latest. Other versions are rarely requested. The list
// bounds the size of the cache.
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
	return ok && cacheable[rest]
}

// get returns the response of a path, which it fetches unless it is cached. Concurrent calls for a
// cacheable path share one call of fetch, whose context does not end with that of the first caller.
func (c *responseCache) get(ctx context.Context, path string, fetch func(ctx context.Context, path string) (*Response, error)) (*Response, error) {
	key := strings.TrimSuffix(path, "/")
	if !isCacheable(key) {
		return fetch(ctx, path)
	}
	if res := c.load(key); res != nil {
		return res, nil
	}
	isFirst := false
	res, err, _ := c.flights.Do(key, func() (any, error) {
		isFirst = true
		// An earlier flight may have cached the response after this request missed it.
		if res := c.load(key); res != nil {
			return res, nil
		}
		res, err := fetch(context.WithoutCancel(ctx), key)
		if err == nil {
			c.responses.Store(key, cachedResponse{res, time.Now().Add(cacheTime)})
		}
		return res, err
	})
	if !isFirst && (err == errPodRate || err == errPodExchanges) {
		return c.get(ctx, path, fetch) // the limit is that of the pod whose call was shared
	}
	return res.(*Response), err
}

// load returns the cached response of a path, or nil.
func (c *responseCache) load(path string) *Response {
	if cached, ok := c.responses.Load(path); ok && time.Now().Before(cached.(cachedResponse).until) {
		return cached.(cachedResponse).Response
	}
	return nil
}
