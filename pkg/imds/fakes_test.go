package imds

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

var assumption = roles.Assumption{RoleARN: "arn:aws:iam::123456789012:role/reader", SessionName: "ns.pod", Duration: time.Hour}

// oneCredentials is an STS that always gives the same.
type oneCredentials struct{}

func (oneCredentials) AssumeRole(context.Context, roles.Assumption) (*credentials.Credentials, error) {
	return &credentials.Credentials{AccessKeyID: "ASIAX", SecretAccessKey: "secret", SessionToken: "token",
		Obtained: time.Now(), Expiration: time.Now().Add(time.Hour)}, nil
}

// anyHolder is a Holder that does not know who holds an address.
func anyHolder(netip.Addr) string { return "" }

// forwarder is a function as a Forwarder.
type forwarder func(w http.ResponseWriter, r *http.Request) error

func (f forwarder) Forward(w http.ResponseWriter, r *http.Request) error { return f(w, r) }

// forwarded is u as the Handler has it answer.
func forwarded(u *Upstream, w http.ResponseWriter, r *http.Request) {
	err := u.Forward(w, r)
	if f, ok := errors.AsType[*httpError](err); ok {
		writeError(w, f.status)
	} else if err != nil {
		writeError(w, http.StatusInternalServerError)
	}
}
