package imds

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// maxUpstreamBody limits a response; the largest real one, user data, has 16 KiB.
const maxUpstreamBody = 1 << 20

// Forward implements Forwarder. It writes the response of the metadata service, streamed and bounded.
// A pod that exceeds a limit is answered with status 503.
func (u *Upstream) Forward(w http.ResponseWriter, r *http.Request) error {
	now, cacheable := time.Now(), isCacheable(r.URL.Path)
	if cacheable {
		if res := u.cache.get(r.URL.Path, now); res != nil {
			res.write(w)
			return nil
		}
	}
	source := sourceOf(r.Context())
	if err := u.limit.begin(source, now); err != nil {
		return err
	}
	defer u.limit.end(source)
	if cacheable {
		return u.forwardCacheable(w, r)
	}
	err := u.do(r.Context(), r.Method, r.URL.Path, func(res *http.Response) error { return stream(w, res) })
	if err != nil {
		return upstreamError(r.URL.Path, err)
	}
	return nil
}

// statusError is an unexpected status of the service. Pods get 404 as it is and 500 for any other: no
// SDK follows redirections, and 401, 403 and 429 concern the proxy's own token and rate. A pod's SDK
// would take a 401 for the end of its own session.
type statusError int

func (s statusError) Error() string { return fmt.Sprintf("it answered with status %d", int(s)) }

// upstreamError returns the answer to a pod whose exchange with the service failed.
func upstreamError(path string, err error) error {
	if err == statusError(http.StatusNotFound) {
		return errNotFound // the instance has no such metadata, which the log need not explain
	}
	return &httpError{http.StatusInternalServerError, fmt.Errorf("the node's metadata service does not answer %s as it should: %w", path, err)}
}

// copyHeader copies the header fields that pods may see.
func copyHeader(header http.Header, res *http.Response, length int64) {
	for _, name := range []string{"Content-Type", "Last-Modified", "Etag", "Accept-Ranges"} {
		if v, ok := res.Header[name]; ok {
			header[name] = v[:1]
		}
	}
	if length >= 0 {
		header["Content-Length"] = []string{strconv.FormatInt(length, 10)}
	}
}

// stream copies the response. After the header is sent, it reports an error by a panic with
// http.ErrAbortHandler: only an aborted connection tells the client that the body is incomplete.
func stream(w http.ResponseWriter, res *http.Response) error {
	if res.ContentLength > maxUpstreamBody {
		return fmt.Errorf("it answered with %d bytes", res.ContentLength)
	}
	copyHeader(w.Header(), res, res.ContentLength)
	// A long response does not fit into the kernel's buffers, so a slow client would occupy an exchange.
	control := http.NewResponseController(w)
	control.SetWriteDeadline(time.Now().Add(upstreamTimeout))
	n, err := io.Copy(w, io.LimitReader(res.Body, maxUpstreamBody+1))
	if err == nil {
		err = control.Flush()
	}
	control.SetWriteDeadline(time.Time{})
	if err != nil || n > maxUpstreamBody {
		panic(http.ErrAbortHandler)
	}
	return nil
}
