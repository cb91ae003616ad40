package imds

import (
	"context"
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
