package imds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
)

// maxBody limits the body of a response. The largest real one, user data, has 16 KiB.
const maxBody = 64 << 10

// Forward implements Forwarder. The error is a *Refusal.
//
// An exchange counts against the pod that began it until it ends. One for a cacheable path goes on
// after the pod's client has disconnected, because others may wait for it.
func (u *Upstream) Forward(ctx context.Context, source netip.Addr, path string) (*Response, error) {
	fetch := func(ctx context.Context, path string) (*Response, error) {
		if err := u.limit.begin(source); err != nil {
			return nil, err
		}
		defer u.limit.end(source)
		return u.fetch(ctx, path)
	}
	res, err := u.cache.get(ctx, path, fetch)
	if _, refused := errors.AsType[*Refusal](err); err == nil || refused {
		return res, err
	}
	if err == statusError(http.StatusNotFound) {
		return nil, errNotFound // the instance has no such metadata, which the log need not explain
	}
	return nil, &Refusal{Status: http.StatusInternalServerError, Err: fmt.Errorf("the node's metadata service does not answer %s as it should: %w", path, err)}
}

// statusError is an unexpected status of the service. Pods get 404 as it is and 500 for any other:
// no SDK follows redirections, and 401, 403 and 429 concern the proxy's own token and rate. A pod's
// SDK would take a 401 for the end of its own session.
type statusError int

func (s statusError) Error() string { return fmt.Sprintf("it answered with status %d", int(s)) }

// fetch makes one exchange. If the service rejects the session token, fetch tries again with a new
// one.
func (u *Upstream) fetch(ctx context.Context, path string) (*Response, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	res, err := u.send(ctx, path, false)
	if err == nil && res.StatusCode == http.StatusUnauthorized {
		res.Body.Close()
		res, err = u.send(ctx, path, true)
	}
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, statusError(res.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxBody+1))
	if err == nil && len(body) > maxBody {
		err = fmt.Errorf("it answered with more than %d bytes", maxBody)
	}
	return &Response{contentType: res.Header["Content-Type"], lastModified: res.Header["Last-Modified"], body: string(body)}, err
}
