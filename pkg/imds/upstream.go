package imds

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Upstream is a client of the node's own metadata service, with a session token of its own. The paths
// of its requests must be canonical and checked.
type Upstream struct {
	base      url.URL
	client    *http.Client
	exchanges chan struct{} // holds one element for each exchange in progress
	limit     *upstreamLimit
	cache     responseCache

	mu       sync.Mutex
	token    string // empty if the service has no version 2
	renewAt  time.Time
	tokenErr error     // of the last request for a token
	retryAt  time.Time // until then, tokenErr is returned instead of another request
}

const (
	// upstreamTimeout limits one exchange with the service, which answers in milliseconds.
	upstreamTimeout = 5 * time.Second
	// maxSmallBody limits a response that is read as a whole.
	maxSmallBody = 64 << 10
	// tokenRetryInterval is the pause after a failed request for a token. Requests would queue otherwise.
	tokenRetryInterval = time.Second
)

// NewUpstream returns a client of the service at address, "host" or "host:port".
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
				MaxIdleConnsPerHost: maxExchanges,
				IdleConnTimeout:     30 * time.Second,
				DisableCompression:  true,
				Proxy:               nil, // the environment's web proxy must never see metadata
			},
			Timeout:       upstreamTimeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		exchanges: make(chan struct{}, maxExchanges),
		limit:     newUpstreamLimit(),
		cache:     responseCache{responses: make(map[string]*cachedResponse)},
	}, nil
}

// URL returns the service's address as a URL.
func (u *Upstream) URL() string { return u.base.String() }

// Get returns the text that the service holds at a canonical path.
func (u *Upstream) Get(ctx context.Context, path string) (text string, err error) {
	err = u.do(ctx, http.MethodGet, path, func(res *http.Response) error {
		body, err := io.ReadAll(io.LimitReader(res.Body, maxSmallBody))
		text = string(body)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("get %s from the metadata service: %w", path, err)
	}
	return text, nil
}

// do makes one exchange and calls read with a response of status 200. If the service rejects the
// session token, do tries again with a new one. For any other status it returns a statusError.
func (u *Upstream) do(ctx context.Context, method, path string, read func(*http.Response) error) error {
	select {
	case u.exchanges <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-u.exchanges }()
	res, err := u.send(ctx, method, path, false)
	if err == nil && res.StatusCode == http.StatusUnauthorized {
		res.Body.Close()
		res, err = u.send(ctx, method, path, true)
	}
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return statusError(res.StatusCode)
	}
	return read(res)
}

func (u *Upstream) send(ctx context.Context, method, path string, renewToken bool) (*http.Response, error) {
	token, err := u.session(ctx, renewToken)
	if err != nil {
		return nil, err
	}
	req, err := u.request(ctx, method, path)
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header[tokenHeader] = []string{token}
	}
	return u.client.Do(req)
}

func (u *Upstream) request(ctx context.Context, method, path string) (*http.Request, error) {
	target := u.base
	target.Path = path
	return http.NewRequestWithContext(ctx, method, target.String(), nil)
}

// session returns the session token. It requests a new one if there is none, if the token is about to
// expire, or if renew is true.
func (u *Upstream) session(ctx context.Context, renew bool) (string, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	if !renew && now.Before(u.renewAt) {
		return u.token, nil
	}
	if now.Before(u.retryAt) {
		return "", u.tokenErr
	}
	if u.tokenErr = u.fetchToken(ctx); u.tokenErr != nil {
		u.retryAt = time.Now().Add(tokenRetryInterval)
	}
	return u.token, u.tokenErr
}

// fetchToken requests a token, or detects that the service has no version 2. The caller holds mu.
func (u *Upstream) fetchToken(ctx context.Context) error {
	// All pods use the token, so its request must not end when one pod's client disconnects.
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
