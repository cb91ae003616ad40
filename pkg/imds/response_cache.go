package imds

import (
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
	return ok && cacheable[rest]
}

// get returns the cached response of a path, or nil.
func (c *responseCache) get(path string) *Response {
	if cached, ok := c.responses.Load(path); ok && time.Now().Before(cached.(cachedResponse).until) {
		return cached.(cachedResponse).Response
	}
	return nil
}

// fetch calls fetch and caches its response, or returns that of a concurrent call for the path.
func (c *responseCache) fetch(path string, fetch func() (*Response, error)) (*Response, error) {
	res, err, _ := c.flights.Do(path, func() (any, error) {
		// An earlier flight may have cached the response after this request missed it.
		if res := c.get(path); res != nil {
			return res, nil
		}
		res, err := fetch()
		if err == nil {
			c.responses.Store(path, cachedResponse{res, time.Now().Add(cacheTime)})
		}
		return res, err
	})
	return res.(*Response), err
}
