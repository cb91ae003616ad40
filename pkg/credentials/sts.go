package credentials

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/awserr"
	sdkclient "github.com/aws/aws-sdk-go/aws/client"
	sdk "github.com/aws/aws-sdk-go/aws/credentials"
	"github.com/aws/aws-sdk-go/aws/credentials/stscreds"
	"github.com/aws/aws-sdk-go/aws/endpoints"
	"github.com/aws/aws-sdk-go/aws/request"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/sts"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// STSConfig is the configuration of an STS client.
type STSConfig struct {
	// Regional selects the region's endpoint instead of the global one.
	Regional bool
	// FIPS selects the region's endpoint with FIPS 140 validated cryptography.
	FIPS bool
	// Endpoint is a URL that overrides Regional and FIPS; empty for none.
	Endpoint string
	// Partition is the partition of the roles, for example "aws-cn"; empty if unknown.
	Partition string
	// Region returns the node's region. LoadSTS calls it only if the endpoint depends on the region
	// and neither the environment nor the shared configuration names one.
	Region func(context.Context) (string, error)
	// MetadataURL is the metadata service of the node; empty for the SDK's default.
	MetadataURL string
	// IntermediateRole is the ARN of a role that the node assumes first and that then assumes the
	// pods' roles; empty for none. SessionName is the node's session name of that role.
	IntermediateRole, SessionName string
	// UserAgent is appended to the SDK's user agent.
	UserAgent string
}

// STS calls AWS's Security Token Service. The node's credentials are those of the SDK's default
// chain: environment, shared files, web identity, container, and the instance's role.
type STS struct{ client *sts.STS }

// LoadSTS reads the SDK's configuration and returns a client. ctx bounds the call of c.Region.
func LoadSTS(ctx context.Context, c STSConfig) (*STS, error) {
	cfg := request.WithRetryer(aws.NewConfig().WithEndpoint(c.Endpoint), retryer{sdkclient.DefaultRetryer{NumMaxRetries: 1}}).
		WithHTTPClient(&http.Client{Transport: newTransport(c.MetadataURL), Timeout: 10 * time.Second}).
		WithCredentialsChainVerboseErrors(true) // errors include the metadata service's answer
	if c.Regional {
		cfg.WithSTSRegionalEndpoint(endpoints.RegionalSTSEndpoint)
	}
	if c.FIPS {
		cfg.UseFIPSEndpoint = endpoints.FIPSEndpointStateEnabled
	}
	sess, err := session.NewSessionWithOptions(session.Options{
		Config:            *cfg,
		SharedConfigState: session.SharedConfigEnable,
		EC2IMDSEndpoint:   c.MetadataURL,
	})
	if err != nil {
		return nil, fmt.Errorf("aws session: %w", err)
	}
	if aws.StringValue(sess.Config.Region) == "" {
		region, err := c.region(ctx, sess.Config)
		if err != nil {
			return nil, fmt.Errorf("the region of the STS endpoint: %w", err)
		}
		sess.Config.Region = aws.String(region)
	}
	sess.Handlers.Build.PushBack(request.MakeAddToUserAgentFreeFormHandler(c.UserAgent))
	client := newClient(sess)
	if c.IntermediateRole != "" {
		client = newClient(sess, aws.NewConfig().WithCredentials(sdk.NewCredentials(&intermediateRole{stscreds.AssumeRoleProvider{
			Client: client, RoleARN: c.IntermediateRole, RoleSessionName: c.SessionName,
			Duration: MaxChained, ExpiryWindow: intermediateMargin,
		}})))
	}
	return &STS{client}, nil
}

const (
	// MaxChained is the longest session that the credentials of another role can assume.
	// https://docs.aws.amazon.com/IAM/latest/UserGuide/id_roles.html ("Role chaining")
	MaxChained = time.Hour
	// intermediateMargin is how long before expiration the intermediate role's credentials are
	// renewed.
	intermediateMargin = 10 * time.Minute
	// intermediateCode is the error code if the intermediate role cannot be assumed.
	intermediateCode = "AssumeRoleChainError"
)

// intermediateRole gives its errors the code intermediateCode, because they do not concern the
// pod's role.
type intermediateRole struct{ stscreds.AssumeRoleProvider }

// RetrieveWithContext implements the SDK's credentials.ProviderWithContext.
func (r *intermediateRole) RetrieveWithContext(ctx sdk.Context) (sdk.Value, error) {
	v, err := r.AssumeRoleProvider.RetrieveWithContext(ctx)
	if err != nil {
		err = awserr.New(intermediateCode, "the role "+r.RoleARN+" of --assume-role-arn", err)
	}
	return v, err
}

// Endpoint returns the URL of STS.
func (s *STS) Endpoint() string { return s.client.Endpoint }

// AssumeRole calls STS. The SDK repeats the call once after a temporary error, and if STS considers
// the node's credentials expired, with new ones. The error is an *Error.
func (s *STS) AssumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error) {
	in := &sts.AssumeRoleInput{
		RoleArn:         aws.String(a.RoleARN),
		RoleSessionName: aws.String(a.SessionName),
		DurationSeconds: aws.Int64(int64(a.Duration / time.Second)),
		ExternalId:      optional(a.ExternalID),
		SourceIdentity:  optional(a.SourceIdentity),
		Policy:          optional(a.SessionPolicy),
	}
	a.Tags.Each(func(key, value string) {
		in.Tags = append(in.Tags, &sts.Tag{Key: aws.String(key), Value: aws.String(value)})
	})
	called := time.Now()
	out, err := s.client.AssumeRoleWithContext(ctx, in)
	if err != nil {
		return nil, classify(err)
	}
	c := out.Credentials
	if c == nil || aws.StringValue(c.AccessKeyId) == "" || aws.StringValue(c.SecretAccessKey) == "" ||
		aws.StringValue(c.SessionToken) == "" || c.Expiration == nil {
		return nil, &Error{Kind: Unavailable, Code: "IncompleteResponse", Message: "AssumeRole answered without credentials"}
	}
	return &Credentials{
		AccessKeyID:     aws.StringValue(c.AccessKeyId),
		SecretAccessKey: Secret(aws.StringValue(c.SecretAccessKey)),
		SessionToken:    Secret(aws.StringValue(c.SessionToken)),
		Obtained:        called,
		Expiration:      aws.TimeValue(c.Expiration),
	}, nil
}

// optional returns nil for an empty parameter, which is not sent.
func optional(value string) *string {
	if value == "" {
		return nil
	}
	return &value
}
