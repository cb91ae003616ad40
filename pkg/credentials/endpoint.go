package credentials

import (
	"cmp"
	"context"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	sdkclient "github.com/aws/aws-sdk-go/aws/client"
	"github.com/aws/aws-sdk-go/aws/endpoints"
	"github.com/aws/aws-sdk-go/aws/request"
	"github.com/aws/aws-sdk-go/service/sts"
)

// globalRegions are the signing regions of the partitions' global endpoints, or the first region of
// a partition without a global endpoint.
// https://docs.aws.amazon.com/general/latest/gr/sts.html
var globalRegions = map[string]string{"aws": "us-east-1", "aws-cn": "cn-north-1", "aws-us-gov": "us-gov-west-1"}

// partitionTimeout bounds the wait for the node's region if only its partition matters.
const partitionTimeout = 10 * time.Second

// region returns the region of the STS endpoint. It is called only if no configuration names a
// region.
func (c STSConfig) region(ctx context.Context, cfg *aws.Config) (string, error) {
	// c may lack these settings, because the environment and the shared configuration can also set
	// them.
	regional := cfg.STSRegionalEndpoint == endpoints.RegionalSTSEndpoint || cfg.UseFIPSEndpoint == endpoints.FIPSEndpointStateEnabled
	region := globalRegions[c.Partition]
	switch {
	case c.Endpoint != "":
		return cmp.Or(region, globalRegions["aws"]), nil
	case regional, c.Partition != "" && region == "": // in an unlisted partition only the node's region is usable
		return c.Region(ctx)
	case region != "":
		return region, nil
	}
	ctx, cancel := context.WithTimeout(ctx, partitionTimeout)
	defer cancel()
	if region, err := c.Region(ctx); err == nil {
		return region, nil
	}
	return globalRegions["aws"], nil
}

// retryer retries temporary errors once. It does not retry throttling, which the Limiter must
// observe.
type retryer struct{ sdkclient.DefaultRetryer }

// ShouldRetry implements request.Retryer.
func (r retryer) ShouldRetry(req *request.Request) bool {
	return !isThrottled(req.Error) && r.DefaultRetryer.ShouldRetry(req)
}

// newClient returns a client of STS. If STS calls the node's credentials expired, the client
// fetches new ones once for all calls that fail at the same time. The SDK's own handler fetches
// them for each failed call, because it expires even credentials that another call has just
// fetched.
func newClient(sess sdkclient.ConfigProvider, cfgs ...*aws.Config) *sts.STS {
	client := sts.New(sess, cfgs...)
	var mu sync.Mutex
	client.Handlers.AfterRetry.PushFront(func(r *request.Request) {
		if !r.IsErrorExpired() || r.RetryCount >= r.MaxRetries() {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		creds := r.Config.Credentials
		if !creds.IsExpired() {
			v, err := creds.GetWithContext(r.Context())
			if err == nil && strings.Contains(r.HTTPRequest.Header.Get("Authorization"), "Credential="+v.AccessKeyID+"/") {
				creds.Expire()
			}
		}
		r.RetryCount++
		r.Retryable, r.Error = aws.Bool(true), nil // repeats the call; the SDK's handler sees no error
	})
	return client
}

var ipv6Metadata = netip.MustParseAddr("fd00:ec2::254")

// newTransport returns a transport for many concurrent calls to one host. The SDK also uses it for
// the metadata service. Those requests never use a web proxy, even if the environment sets one,
// because a web proxy would see the node's credentials.
func newTransport(metadataURL string) *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy = func(r *http.Request) (*url.URL, error) {
		ip, _ := netip.ParseAddr(r.URL.Hostname())
		isMetadata := metadataURL != "" && strings.HasPrefix(r.URL.String(), metadataURL)
		if isMetadata || ip.IsLinkLocalUnicast() || ip == ipv6Metadata {
			return nil, nil
		}
		return http.ProxyFromEnvironment(r)
	}
	t.DialContext = (&net.Dialer{Timeout: 3 * time.Second}).DialContext
	t.MaxIdleConnsPerHost = 16
	return t
}
