package credentials

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/awserr"
	sdk "github.com/aws/aws-sdk-go/aws/credentials"
	"github.com/aws/aws-sdk-go/aws/credentials/stscreds"
	"github.com/aws/aws-sdk-go/aws/ec2metadata"
	"github.com/aws/aws-sdk-go/aws/endpoints"
	"github.com/aws/aws-sdk-go/aws/request"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/sts"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// STSConfig is how STS is reached.
type STSConfig struct {
	// Regional asks the endpoint of the region rather than the global one.
	Regional bool
	// FIPS asks the region's endpoint with FIPS 140 validated cryptography.
	FIPS bool
	// Endpoint, a URL, overrides all of these; empty for none.
	Endpoint string
	// MetadataURL is the metadata service that the node's own credentials and region come from; empty for the SDK's default.
	MetadataURL string
	// Through is the ARN of a role that the node assumes first, to assume the pods' roles by it; empty for none.
	Through string
	// Session names the node's session of that role.
	Session string
	// UserAgent is added to the SDK's own.
	UserAgent string
}

// STS asks AWS's Security Token Service with the node's default credential chain: environment, shared files, web identity,
// container, and the instance's role. It is the one place that uses aws-sdk-go.
type STS struct {
	client *sts.STS
	node   []*sdk.Credentials // what to get anew where STS calls them expired, in this order
}

// NewSTS makes the client. It asks the node's metadata service for the region where it is needed and nothing else names it;
// ctx bounds that.
func NewSTS(ctx context.Context, c STSConfig) (*STS, error) {
	cfg := aws.NewConfig().
		WithHTTPClient(&http.Client{Transport: transport(c.MetadataURL), Timeout: 10 * time.Second}).
		// One try more than the first: the cache has its own pace, and a pod waits.
		WithMaxRetries(1).
		WithSTSRegionalEndpoint(endpoints.LegacySTSEndpoint)
	if c.Regional {
		cfg.WithSTSRegionalEndpoint(endpoints.RegionalSTSEndpoint)
	}
	if c.FIPS {
		cfg.UseFIPSEndpoint = endpoints.FIPSEndpointStateEnabled
	}
	if c.Endpoint != "" {
		cfg.WithEndpoint(c.Endpoint)
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
		region := "us-east-1" // what the global endpoint is signed for
		if (c.Regional || c.FIPS) && c.Endpoint == "" {
			// The session's endpoint is that of STS; the metadata client must have its own.
			meta := ec2metadata.New(sess, metadataConfig(c.MetadataURL))
			if region, err = meta.RegionWithContext(ctx); err != nil {
				return nil, fmt.Errorf("the region of the regional STS endpoint: %w", err)
			}
		}
		sess.Config.Region = aws.String(region)
	}
	if c.UserAgent != "" {
		sess.Handlers.Build.PushBack(request.MakeAddToUserAgentFreeFormHandler(c.UserAgent))
	}
	s := &STS{client: sts.New(sess)}
	s.node = []*sdk.Credentials{s.client.Config.Credentials}
	if c.Through != "" {
		between := sdk.NewCredentials(&through{stscreds.AssumeRoleProvider{
			Client: s.client, RoleARN: c.Through, RoleSessionName: c.Session,
			Duration: MaxChained, ExpiryWindow: throughMargin,
		}})
		s.client = sts.New(sess, aws.NewConfig().WithCredentials(between))
		s.node = append(s.node, between)
	}
	return s, nil
}

const (
	// MaxChained is how long a session may last that was assumed by another's credentials
	// (https://docs.aws.amazon.com/IAM/latest/UserGuide/id_roles.html, "Role chaining").
	MaxChained = time.Hour
	// throughMargin is how long before their end the credentials in between are renewed.
	throughMargin = 10 * time.Minute
	// throughCode is the code of a failure to get them.
	throughCode = "AssumeRoleChainError"
)

// through is the role that the node assumes first. That it does not get it is no fault of the pod's role.
type through struct{ stscreds.AssumeRoleProvider }

// RetrieveWithContext implements credentials.ProviderWithContext of the SDK.
func (t *through) RetrieveWithContext(ctx sdk.Context) (sdk.Value, error) {
	v, err := t.AssumeRoleProvider.RetrieveWithContext(ctx)
	if err != nil {
		err = awserr.New(throughCode, "the role "+t.RoleARN+" that is assumed first", err)
	}
	return v, err
}

func metadataConfig(url string) *aws.Config {
	if url == "" {
		return aws.NewConfig().WithEndpoint("http://169.254.169.254/latest")
	}
	return aws.NewConfig().WithEndpoint(strings.TrimSuffix(url, "/") + "/latest")
}

// transport is net/http's own with the pool sized for one host that many flights use at once. The SDK asks the metadata
// service by it too, and that is never done by way of a web proxy, whatever the environment says: it would see the node's
// own credentials.
func transport(metadataURL string) *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	var metadataHost string
	if meta, err := url.Parse(metadataURL); err == nil {
		metadataHost = meta.Hostname()
	}
	t.Proxy = func(r *http.Request) (*url.URL, error) {
		host := r.URL.Hostname()
		ip, err := netip.ParseAddr(host)
		if host == metadataHost || err == nil && (ip.IsLinkLocalUnicast() || ip == ipv6Metadata) {
			return nil, nil
		}
		return http.ProxyFromEnvironment(r)
	}
	t.DialContext = (&net.Dialer{Timeout: 3 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	t.TLSHandshakeTimeout = 5 * time.Second
	t.ResponseHeaderTimeout = 8 * time.Second
	t.MaxIdleConnsPerHost = 16
	return t
}

var ipv6Metadata = netip.MustParseAddr("fd00:ec2::254")

// Endpoint is the URL that STS is asked at.
func (s *STS) Endpoint() string { return s.client.Endpoint }

// AssumeRole makes one call, with the SDK's retry of what may pass at once. Node credentials that STS calls expired are
// renewed and the call made once more. The error is an *Error.
func (s *STS) AssumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error) {
	creds, err := s.assumeRole(ctx, a)
	if e, ok := errors.AsType[*Error](err); ok && (e.Code == "ExpiredToken" || e.Code == "ExpiredTokenException") {
		for _, c := range s.node {
			c.Expire()
		}
		creds, err = s.assumeRole(ctx, a)
	}
	return creds, err
}

func (s *STS) assumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error) {
	in := &sts.AssumeRoleInput{
		RoleArn:         aws.String(a.RoleARN),
		RoleSessionName: aws.String(a.SessionName),
		DurationSeconds: aws.Int64(int64(a.Duration / time.Second)),
	}
	if a.ExternalID != "" {
		in.ExternalId = aws.String(a.ExternalID)
	}
	if a.SourceIdentity != "" {
		in.SourceIdentity = aws.String(a.SourceIdentity)
	}
	if a.SessionPolicy != "" {
		in.Policy = aws.String(a.SessionPolicy)
	}
	a.Tags.Each(func(key, value string) {
		in.Tags = append(in.Tags, &sts.Tag{Key: aws.String(key), Value: aws.String(value)})
	})
	asked := time.Now()
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
		Obtained:        asked,
		Expiration:      aws.TimeValue(c.Expiration),
	}, nil
}

// classify sorts an error of the SDK by its code.
// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html#API_AssumeRole_Errors
// https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html
func classify(err error) *Error {
	e := &Error{Kind: Unavailable, Code: "RequestError", Message: err.Error()}
	ae, ok := errors.AsType[awserr.Error](err)
	if !ok {
		return e
	}
	e.Code, e.Message = ae.Code(), ae.Message()
	if cause := ae.OrigErr(); cause != nil {
		e.Message += ": " + cause.Error()
	}
	switch e.Code {
	case "AccessDenied", "AccessDeniedException", "RegionDisabledException", "NoSuchEntity":
		e.Kind = Denied
		return e
	case "ValidationError", "ValidationException", "MalformedPolicyDocument", "PackedPolicyTooLarge", "InvalidParameterValue",
		"InvalidParameterCombination", "InvalidParameter", request.ParamRequiredErrCode:
		e.Kind = Malformed
		return e
	case "ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException",
		"SignatureDoesNotMatch", "IncompleteSignature", "MissingAuthenticationToken", "RequestExpired", "OptInRequired",
		"NoCredentialProviders", "EC2RoleRequestError", "SharedCredsLoad", "WebIdentityErr":
		e.Kind = NodeCredentials
		return e
	case throughCode:
		e.Kind = NodeCredentials
		if cause := classify(ae.OrigErr()); cause.Kind == Throttled || cause.Kind == Unavailable {
			e.Kind = cause.Kind
		}
		return e
	}
	if request.IsErrorThrottle(err) {
		e.Kind = Throttled
		return e
	}
	if rf, ok := errors.AsType[awserr.RequestFailure](err); ok && rf.StatusCode() == http.StatusTooManyRequests {
		e.Kind = Throttled
	}
	return e
}
