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

// Upstream is a client of the node's own metadata service, with a session token of its own. The
// paths of its requests must be canonical and checked.
type Upstream struct {
	base   url.URL
	client *http.Client
	limit  *upstreamLimit
	cache  responseCache

	mu       sync.Mutex
	token    string // empty if the service has no version 2
	renewAt  time.Time
	tokenErr error     // of the last request for a token
	retryAt  time.Time // until then, tokenErr is returned instead of another request
}

const (
	// upstreamTimeout limits one exchange with the service, which answers in milliseconds.
	upstreamTimeout = 5 * time.Second
	// tokenRetryInterval is the pause after a failed request for a token. Requests would queue
	// otherwise.
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
				MaxConnsPerHost:     maxExchanges,
				MaxIdleConnsPerHost: maxExchanges,
				IdleConnTimeout:     30 * time.Second,
				DisableCompression:  true,
				Proxy:               nil, // the environment's web proxy must never see metadata
			},
			Timeout:       upstreamTimeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		limit: newUpstreamLimit(),
	}, nil
}

// URL returns the service's address as a URL.
func (u *Upstream) URL() string { return u.base.String() }

// Get returns the text that the service has at a canonical path.
func (u *Upstream) Get(ctx context.Context, path string) (text string, err error) {
	res, err := u.fetch(ctx, path)
	if err != nil {
		return "", fmt.Errorf("get %s from the metadata service: %w", path, err)
	}
	return res.body, nil
}

// send makes a GET request with the session token.
func (u *Upstream) send(ctx context.Context, path string, renewToken bool) (*http.Response, error) {
	token, err := u.session(ctx, renewToken)
	if err != nil {
		return nil, err
	}
	return u.request(ctx, http.MethodGet, path, tokenHeader, token)
}

// request makes a request with one header field. An empty value omits the field.
func (u *Upstream) request(ctx context.Context, method, path, header, value string) (*http.Response, error) {
	target := u.base
	target.Path = path
	req, err := http.NewRequestWithContext(ctx, method, target.String(), nil)
	if err != nil {
		return nil, err
	}
	if value != "" {
		req.Header[header] = []string{value}
	}
	return u.client.Do(req)
}

// session returns the session token. It requests a new one if there is none, if the token is about
// to expire, or if renew is true.
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
	res, err := u.request(context.WithoutCancel(ctx), http.MethodPut, "/latest/api/token", tokenTTLHeader, strconv.Itoa(maxTTL))
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
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
