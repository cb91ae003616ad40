package imds

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

var assumption = roles.Assumption{RoleARN: "arn:aws:iam::123456789012:role/reader", SessionName: "ns.pod", Duration: time.Hour}

// oneCredentials is an STS that always gives the same.
type oneCredentials struct{}

func (oneCredentials) AssumeRole(context.Context, roles.Assumption) (*credentials.Credentials, error) {
	return &credentials.Credentials{AccessKeyID: "ASIAX", SecretAccessKey: "secret", SessionToken: "token",
		Obtained: time.Now(), Expiration: time.Now().Add(time.Hour)}, nil
}

// noObserver is a credentials.Observer that observes nothing.
type noObserver struct{}

func (noObserver) Assumed(string, time.Duration) {}
func (noObserver) Requested(bool)                {}

// anyHolder is a Holder that does not know who holds an address.
func anyHolder(netip.Addr) string { return "" }

// forwarder is a function as a Forwarder.
type forwarder func(path string) (*Response, error)

func (f forwarder) Forward(_ context.Context, _ netip.Addr, path string) (*Response, error) {
	return f(path)
}

// newTestHandler is NewHandler with defaults.
func newTestHandler(c Config) *Handler {
	if c.Sessions == nil {
		c.Sessions = NewSessions(NewKey())
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Refused == nil {
		c.Refused = func(int) {}
	}
	if c.Delayed == nil {
		c.Delayed = func() {}
	}
	return NewHandler(c)
}

// newTestConn returns a connection of a Listener that limits nothing else than requests.
func newTestConn(c *net.TCPConn, source netip.Addr, requests *ratelimit.Keyed[netip.Addr]) *conn {
	connections := NewConnections(0)
	connections.requests = requests
	return &conn{TCPConn: c, source: source, listener: &Listener{holder: anyHolder, connections: connections}}
}

// forwarded returns the status and the response of u for a pod.
func forwarded(ctx context.Context, u *Upstream, source netip.Addr, path string) (status int, res Response) {
	got, err := u.Forward(ctx, source, path)
	if err != nil {
		refusal, _ := errors.AsType[*Refusal](err)
		return refusal.Status, Response{}
	}
	return http.StatusOK, *got
}
