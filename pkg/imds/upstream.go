package imds

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// Upstream asks the node's own metadata service, with a session token of its own. It implements Forwarder for what pods may see
// of it; the paths it is given must be canonical and checked.
type Upstream struct {
	base   url.URL
	client *http.Client
	slots  chan struct{}
	shares *shares // of the slots, by the pod's address
	paces  *ratelimit.Keyed[netip.Addr]
	pace   *rate.Limiter // of all pods
	kept   kept

	mu      sync.Mutex
	token   string // empty where the service has no version 2
	renewAt time.Time
	down    error     // why the last try for a token failed; nil after a success
	retryAt time.Time // until then down answers in place of another try
}

const (
	// upstreamTime bounds one exchange with the service, which answers in milliseconds.
	upstreamTime = 5 * time.Second
	// upstreamSlots bounds the exchanges at a time: the service serves the whole node.
	upstreamSlots = 16
	// upstreamShare is how many of them one pod may have.
	upstreamShare = 4
	// upstreamPace and upstreamBurst bound how often one pod may have the service asked, which allows the node 1024 packets a
	// second for this, DNS and NTP together (Amazon VPC User Guide, "Amazon DNS server", quotas).
	upstreamPace, upstreamBurst = 10, 50
	// nodePace bounds what all pods have it asked together: an exchange is two packets and their acknowledgements.
	nodePace = 200
	// maxUpstreamBody bounds an answer; the largest real one, user data, has 16 KiB.
	maxUpstreamBody = 1 << 20
	// maxSmallBody bounds an answer that is read whole.
	maxSmallBody = 64 << 10
	// upstreamPause is how long a service that does not answer is left alone: who waits for it waits in a queue.
	upstreamPause = time.Second
)

// NewUpstream is a client of the service at address, "host" or "host:port".
func NewUpstream(address string) (*Upstream, error) {
	base, err := url.Parse("http://" + address)
	if err != nil || base.Host == "" || base.Host != address {
		return nil, fmt.Errorf("%q is not the address of a metadata service (host or host:port)", address)
	}
	return &Upstream{
		base: *base,
		client: &http.Client{
			Transport: &http.Transport{
				DialContext:         (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
				MaxIdleConnsPerHost: upstreamSlots,
				IdleConnTimeout:     30 * time.Second,
				DisableCompression:  true,
				Proxy:               nil, // whatever the environment says, metadata is never fetched by way of a web proxy
			},
			Timeout:       upstreamTime,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		slots: make(chan struct{}, upstreamSlots), shares: newShares(upstreamShare), paces: ratelimit.NewKeyed[netip.Addr](upstreamPace, upstreamBurst),
		pace: rate.NewLimiter(nodePace, nodePace), kept: kept{answers: make(map[string]*keptAnswer)},
	}, nil
}

// URL is the service's address as a URL.
func (u *Upstream) URL() string { return u.base.String() }

// Forward answers with what the service says, streamed and bounded. A pod that asks too often, or too much at once, is told to
// come again later, by a status that SDKs do so at.
func (u *Upstream) Forward(w http.ResponseWriter, r *http.Request) error {
	source, _ := sourceOf(r.Context())
	path := r.URL.Path
	keeps := lasts(path)
	if keeps {
		if a := u.kept.get(path, time.Now()); a != nil {
			a.write(w) // costs the service nothing
			return nil
		}
	}
	if !u.shares.take(source) {
		return &forwardError{http.StatusServiceUnavailable, errShare}
	}
	done := func() { u.shares.give(source) }
	if now := time.Now(); !u.paces.Allow(source, now) {
		done()
		return &forwardError{http.StatusServiceUnavailable, errPace}
	} else if !u.pace.AllowN(now, 1) {
		done()
		return &forwardError{http.StatusServiceUnavailable, errNodePace}
	}
	if keeps {
		return u.forwardKept(w, r, done)
	}
	defer done()
	return u.pass(w, r)
}

var (
	errShare = fmt.Errorf("it asks for more than %d other metadata at a time", upstreamShare)
	errPace  = fmt.Errorf("it asks for other metadata more than %d times a second", upstreamPace)

	errNodePace = fmt.Errorf("the pods of this node ask for other metadata more than %d times a second", nodePace)
)

// forwardError is why there is no answer to pass on, and the status that says so to the pod.
type forwardError struct {
	status int
	reason error
}

func (e *forwardError) Error() string { return e.reason.Error() }
func (e *forwardError) Unwrap() error { return e.reason }

// strange is an error of the service. A redirection is followed by no SDK, and what the service holds against the proxy's own
// session or pace (401, 403, 429) is nothing that the pod did: to its SDK a 401 would mean its session with us.
type strange int

func (s strange) Error() string { return fmt.Sprintf("it answered with status %d", int(s)) }

// failed is the forwardError of an exchange that failed.
func failed(path string, err error) error {
	if err == strange(http.StatusNotFound) {
		return &forwardError{http.StatusNotFound, err}
	}
	return &forwardError{http.StatusInternalServerError, fmt.Errorf("the node's metadata service does not answer %s as it should: %w", path, err)}
}

// passOn copies what pods may see of an answer's header.
func passOn(header http.Header, res *http.Response, length int64) {
	for _, name := range []string{"Content-Type", "Last-Modified", "Etag", "Accept-Ranges"} {
		if v, ok := res.Header[name]; ok {
			header[name] = v[:1]
		}
	}
	if length >= 0 {
		header["Content-Length"] = []string{strconv.FormatInt(length, 10)}
	}
}

func (u *Upstream) pass(w http.ResponseWriter, r *http.Request) error {
	res, done, err := u.do(r.Context(), r.Method, r.URL.Path)
	if err != nil {
		return failed(r.URL.Path, err)
	}
	defer done()
	switch {
	case res.StatusCode != http.StatusOK:
		return failed(r.URL.Path, strange(res.StatusCode))
	case res.ContentLength > maxUpstreamBody:
		return failed(r.URL.Path, fmt.Errorf("it answered with %d bytes", res.ContentLength))
	}
	passOn(w.Header(), res, res.ContentLength)
	// A long answer does not fit into the kernel's buffers: a client that takes it drop by drop holds a slot.
	control := http.NewResponseController(w)
	control.SetWriteDeadline(time.Now().Add(upstreamTime))
	n, err := io.Copy(w, io.LimitReader(res.Body, maxUpstreamBody+1))
	if err == nil {
		err = control.Flush()
	}
	control.SetWriteDeadline(time.Time{})
	if err != nil || n > maxUpstreamBody {
		// The head is on its way: only an aborted connection says that this is not all.
		panic(http.ErrAbortHandler)
	}
	return nil
}

// Get is the small text that the service holds at a canonical path.
func (u *Upstream) Get(ctx context.Context, path string) (string, error) {
	res, done, err := u.do(ctx, http.MethodGet, path)
	if err != nil {
		return "", err
	}
	defer done()
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the metadata service answered %s with status %d", path, res.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxSmallBody))
	if err != nil {
		return "", err
	}
	return string(body), nil
}

// do makes one exchange, and another one with a new token where the service no longer knows the old. The response's body is
// to be read before done is called.
func (u *Upstream) do(ctx context.Context, method, path string) (res *http.Response, done func(), err error) {
	select {
	case u.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	free := func() { <-u.slots }
	for renew := false; ; renew = true {
		token, err := u.session(ctx, renew)
		if err != nil {
			free()
			return nil, nil, err
		}
		req, err := u.request(ctx, method, path)
		if err != nil {
			free()
			return nil, nil, err
		}
		if token != "" {
			req.Header[tokenHeader] = []string{token}
		}
		res, err = u.client.Do(req)
		if err != nil {
			free()
			return nil, nil, err
		}
		if res.StatusCode != http.StatusUnauthorized || renew {
			return res, func() { res.Body.Close(); free() }, nil
		}
		res.Body.Close()
	}
}

func (u *Upstream) request(ctx context.Context, method, path string) (*http.Request, error) {
	target := u.base
	target.Path = path
	return http.NewRequestWithContext(ctx, method, target.String(), nil)
}

// session is the token to use, fetched where there is none, it is nearly over, or renew says that it is not accepted.
func (u *Upstream) session(ctx context.Context, renew bool) (string, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	if !renew && now.Before(u.renewAt) {
		return u.token, nil
	}
	if now.Before(u.retryAt) {
		return "", u.down
	}
	if u.down = u.fetchToken(ctx); u.down != nil {
		u.retryAt = time.Now().Add(upstreamPause)
	}
	return u.token, u.down
}

// fetchToken gets a token, or learns that the service has no version 2. The mutex is held.
func (u *Upstream) fetchToken(ctx context.Context) error {
	// The token is everyone's: its request must not end because the client that happened to need it went away.
	req, err := u.request(context.WithoutCancel(ctx), http.MethodPut, "/latest/api/token")
	if err != nil {
		return err
	}
	req.Header[tokenTTLHeader] = []string{strconv.Itoa(maxTTL)}
	res, err := u.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxSmallBody))
	switch {
	case err != nil:
		return err
	case res.StatusCode == http.StatusOK:
		u.token, u.renewAt = strings.TrimSpace(string(body)), time.Now().Add((maxTTL-600)*time.Second)
	case res.StatusCode >= 500:
		return fmt.Errorf("the metadata service answered the request for a token with status %d", res.StatusCode)
	default: // version 1 only
		u.token, u.renewAt = "", time.Now().Add(time.Minute)
	}
	return nil
}
