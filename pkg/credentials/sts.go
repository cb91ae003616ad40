package credentials

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
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
	// Endpoint, a URL, overrides all of these; empty for none.
	Endpoint string
	// Partition is the partition of the roles, for example "aws-cn"; empty if it is not known.
	Partition string
	// Region returns the node's region. It is called if neither the environment nor the shared configuration names one, and the
	// endpoint depends on it.
	Region func(context.Context) (string, error)
	// MetadataURL is the metadata service that the node's own credentials come from; empty for the SDK's default.
	MetadataURL string
	// Through is the ARN of a role that the node assumes first, and by which it assumes the pods' roles; empty for none.
	Through string
	// Session names the node's session of that role.
	Session string
	// UserAgent is added to the SDK's own.
	UserAgent string
}

// STS calls AWS's Security Token Service with the node's default credential chain: environment, shared files, web identity,
// container, and the instance's role. This package is the only one that uses aws-sdk-go.
type STS struct {
	client *sts.STS
	mu     sync.Mutex         // one flight at a time expires the node's credentials
	node   []*sdk.Credentials // the node's own, then those of the role in between
}

// NewSTS returns a client. ctx bounds how long c.Region may take.
func NewSTS(ctx context.Context, c STSConfig) (*STS, error) {
	cfg := request.WithRetryer(aws.NewConfig(), retryer{sdkclient.DefaultRetryer{NumMaxRetries: 1}}).
		WithHTTPClient(&http.Client{Transport: transport(c.MetadataURL), Timeout: 10 * time.Second}).
		WithCredentialsChainVerboseErrors(true) // with the metadata service's answer
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
		region, err := c.region(ctx, sess.Config)
		if err != nil {
			return nil, fmt.Errorf("the region of the STS endpoint: %w", err)
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
	// MaxChained is the longest session that the credentials of another role can assume
	// (https://docs.aws.amazon.com/IAM/latest/UserGuide/id_roles.html, "Role chaining").
	MaxChained = time.Hour
	// throughMargin is how long before their end the credentials of the role in between are renewed.
	throughMargin = 10 * time.Minute
	// throughCode is the error code if they cannot be fetched.
	throughCode = "AssumeRoleChainError"
)

// through is the role that the node assumes first. It marks its errors, which do not concern the pod's role.
type through struct{ stscreds.AssumeRoleProvider }

// RetrieveWithContext implements credentials.ProviderWithContext of the SDK.
func (t *through) RetrieveWithContext(ctx sdk.Context) (sdk.Value, error) {
	v, err := t.AssumeRoleProvider.RetrieveWithContext(ctx)
	if err != nil {
		err = awserr.New(throughCode, "the role "+t.RoleARN+" of --assume-role-arn", err)
	}
	return v, err
}

// globalRegions are the signing regions of the partitions' global endpoints, or a partition's first region if it has no global endpoint.
// https://docs.aws.amazon.com/general/latest/gr/sts.html
var globalRegions = map[string]string{"aws": "us-east-1", "aws-cn": "cn-north-1", "aws-us-gov": "us-gov-west-1"}

// regionPatience bounds the wait for a region that is needed for its partition only.
const regionPatience = 10 * time.Second

// region returns the endpoint's region if no configuration names it.
func (c STSConfig) region(ctx context.Context, cfg *aws.Config) (string, error) {
	// The environment and the shared configuration can set these, too.
	regional := cfg.STSRegionalEndpoint == endpoints.RegionalSTSEndpoint || cfg.UseFIPSEndpoint == endpoints.FIPSEndpointStateEnabled
	region, known := globalRegions[c.Partition]
	switch {
	case c.Endpoint != "", c.Region == nil:
		return cmp.Or(region, globalRegions["aws"]), nil
	case regional, c.Partition != "" && !known: // of an unknown partition, only the node's own region is known
		return c.Region(ctx)
	case known:
		return region, nil
	}
	ctx, cancel := context.WithTimeout(ctx, regionPatience)
	defer cancel()
	if of, err := c.Region(ctx); err == nil {
		return of, nil
	}
	return globalRegions["aws"], nil
}

// retryer retries temporary errors once, because a pod waits: a broken connection, a server's error. It does not retry throttling, which
// the Pace must observe, nor expired credentials, which each running call would fetch again.
type retryer struct{ sdkclient.DefaultRetryer }

// ShouldRetry implements request.Retryer.
func (r retryer) ShouldRetry(req *request.Request) bool {
	return !throttles(req.Error) && !request.IsErrorExpiredCreds(req.Error) && r.DefaultRetryer.ShouldRetry(req)
}

// transport returns net/http's transport with a pool for one host and many concurrent flights. The SDK uses it for the metadata
// service, too, and never through a web proxy, whatever the environment says: a web proxy would see the node's own
// credentials.
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

// Endpoint returns the URL of STS.
func (s *STS) Endpoint() string { return s.client.Endpoint }

// AssumeRole makes one call, with one retry of temporary errors. If STS calls the node's credentials expired, it renews them and
// calls once more. The error is an *Error.
func (s *STS) AssumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error) {
	by, err := s.keys(ctx)
	if err != nil {
		return nil, classify(err)
	}
	creds, err := s.assumeRole(ctx, a)
	if e, ok := errors.AsType[*Error](err); ok && (e.Code == "ExpiredToken" || e.Code == "ExpiredTokenException") {
		s.expire(ctx, by)
		creds, err = s.assumeRole(ctx, a)
	}
	return creds, err
}

// keys returns the IDs of the keys that sign a call now. With a role in between, the node's own is empty if it has expired.
func (s *STS) keys(ctx context.Context) ([]string, error) {
	ids := make([]string, len(s.node))
	for i, c := range s.node {
		last := i == len(s.node)-1
		if !last && c.IsExpired() {
			continue // the SDK fetches them if it needs them, and a metadata service may hang
		}
		v, err := c.GetWithContext(ctx)
		if err != nil && last {
			return nil, err
		}
		ids[i] = v.AccessKeyID
	}
	return ids, nil
}

// expire makes the SDK fetch the node's credentials again if they still have these keys. If STS calls them expired in many flights, only
// the first one has an effect.
func (s *STS) expire(ctx context.Context, keys []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, err := s.keys(ctx)
	for i := range now {
		if err == nil && now[i] == keys[i] && now[i] != "" {
			s.node[i].Expire()
		}
	}
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
