package credentials

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
)

// TestManyCallsWithExpiredCredentialsFetchThemOnce makes all calls before STS answers the first.
func TestManyCallsWithExpiredCredentialsFetchThemOnce(t *testing.T) {
	s := cloud(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	var given atomic.Int64
	m := metadata(t, &given)
	s.PutPrincipal(sts.Principal{AccessKeyID: "ASIANODE1", SecretAccessKey: "s", SessionToken: "t", ARN: nodeName, UserID: "x", Expires: time.Unix(1, 0)})
	for i := range 40 {
		s.PutPrincipal(sts.Principal{AccessKeyID: fmt.Sprint("ASIANODE", i+2), SecretAccessKey: "s", SessionToken: "t", ARN: nodeName, UserID: "x"})
	}
	s.PutRole(sts.Role{ARN: account + "reader", Trusts: []string{nodeName}})
	s.SetFault(sts.Fault{Latency: 300 * time.Millisecond})
	c := client(t, STSConfig{Endpoint: s.URL(), MetadataURL: m.URL})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			a := roles.Assumption{RoleARN: account + "reader", SessionName: fmt.Sprint("ns.pod-", i), Duration: time.Hour}
			if _, err := c.AssumeRole(t.Context(), a); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if given.Load() != 2 {
		t.Errorf("the node's credentials were fetched %d times, want 2", given.Load())
	}
}

func TestMetadataRequestsBypassWebProxy(t *testing.T) {
	// http.ProxyFromEnvironment reads the environment once in a process, so this test starts
	// another process.
	if os.Getenv("HTTP_PROXY") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), "HTTP_PROXY=http://proxy.example:3128", "HTTPS_PROXY=http://proxy.example:3128")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	for target, want := range map[string]bool{
		"http://169.254.169.254/latest/api/token": false,
		"http://[fd00:ec2::254]/latest/api/token": false,
		"http://metadata.example:80/latest/":      false,
		"https://sts.amazonaws.com/":              true,
	} {
		r, err := http.NewRequest(http.MethodGet, target, nil)
		if err != nil {
			t.Fatal(err)
		}
		by, err := newTransport("http://metadata.example").Proxy(r)
		if err != nil || (by != nil) != want {
			t.Errorf("%s: web proxy %v, %v", target, by, err)
		}
	}
}

func TestEndpoints(t *testing.T) {
	for name, tt := range map[string]struct {
		config STSConfig
		env    map[string]string
		want   string
	}{
		"global":                     {STSConfig{}, nil, "https://sts.amazonaws.com"},
		"global, with a region":      {STSConfig{}, map[string]string{"AWS_REGION": "us-west-2"}, "https://sts.amazonaws.com"},
		"regional by environment":    {STSConfig{Regional: true}, map[string]string{"AWS_REGION": "ap-south-2"}, "https://sts.ap-south-2.amazonaws.com"},
		"regional by metadata":       {STSConfig{Regional: true}, nil, "https://sts.eu-west-3.amazonaws.com"},
		"China":                      {STSConfig{Regional: true}, map[string]string{"AWS_REGION": "cn-north-1"}, "https://sts.cn-north-1.amazonaws.com.cn"},
		"China, global":              {STSConfig{}, map[string]string{"AWS_REGION": "cn-north-1"}, "https://sts.cn-north-1.amazonaws.com.cn"},
		"GovCloud":                   {STSConfig{Regional: true}, map[string]string{"AWS_REGION": "us-gov-west-1"}, "https://sts.us-gov-west-1.amazonaws.com"},
		"GovCloud, FIPS":             {STSConfig{FIPS: true}, map[string]string{"AWS_REGION": "us-gov-west-1"}, "https://sts.us-gov-west-1.amazonaws.com"},
		"FIPS":                       {STSConfig{FIPS: true}, map[string]string{"AWS_REGION": "us-east-2"}, "https://sts-fips.us-east-2.amazonaws.com"},
		"FIPS and regional":          {STSConfig{FIPS: true, Regional: true}, map[string]string{"AWS_REGION": "us-west-2"}, "https://sts-fips.us-west-2.amazonaws.com"},
		"FIPS by metadata":           {STSConfig{FIPS: true}, nil, "https://sts-fips.eu-west-3.amazonaws.com"},
		"regional by AWS's variable": {STSConfig{}, map[string]string{"AWS_REGION": "eu-west-1", "AWS_STS_REGIONAL_ENDPOINTS": "regional"}, "https://sts.eu-west-1.amazonaws.com"},
		"regional by AWS's variable and metadata": {STSConfig{}, map[string]string{"AWS_STS_REGIONAL_ENDPOINTS": "regional"}, "https://sts.eu-west-3.amazonaws.com"},
		"FIPS by AWS's variable":                  {STSConfig{}, map[string]string{"AWS_USE_FIPS_ENDPOINT": "true"}, "https://sts-fips.eu-west-3.amazonaws.com"},
		"China by the roles":                      {STSConfig{Partition: "aws-cn"}, nil, "https://sts.cn-north-1.amazonaws.com.cn"},
		"GovCloud by the roles":                   {STSConfig{Partition: "aws-us-gov"}, nil, "https://sts.us-gov-west-1.amazonaws.com"},
		"FIPS, roles known":                       {STSConfig{FIPS: true, Partition: "aws"}, nil, "https://sts-fips.eu-west-3.amazonaws.com"},
		"configured":                              {STSConfig{Endpoint: "https://vpce.example"}, nil, "https://vpce.example"},
		"configured and regional":                 {STSConfig{Endpoint: "https://vpce.example", Regional: true}, nil, "https://vpce.example"},
	} {
		t.Run(name, func(t *testing.T) {
			cloud(t)
			for k, v := range tt.env {
				t.Setenv(k, v)
			}
			tt.config.Region = func(context.Context) (string, error) { return "eu-west-3", nil }
			if got := client(t, tt.config).Endpoint(); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
		})
	}
}

// TestUnknownRegion uses a metadata service that does not answer.
func TestUnknownRegion(t *testing.T) {
	cloud(t)
	unknown := func(in string) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			if in != "" {
				return in, nil
			}
			<-ctx.Done()
			return "", ctx.Err()
		}
	}
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		s, err := LoadSTS(t.Context(), STSConfig{Region: unknown("")})
		if err != nil || s.Endpoint() != "https://sts.amazonaws.com" || time.Since(start) != partitionTimeout {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		if s, err = LoadSTS(t.Context(), STSConfig{Region: unknown("cn-northwest-1")}); err != nil || s.Endpoint() != "https://sts.cn-northwest-1.amazonaws.com.cn" {
			t.Errorf("unknown partition of the roles, node in China: %v", err)
		}
		if s, err = LoadSTS(t.Context(), STSConfig{Partition: "aws-iso", Region: unknown("us-iso-east-1")}); err != nil || s.Endpoint() != "https://sts.us-iso-east-1.c2s.ic.gov" {
			t.Errorf("unlisted partition: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		// A regional endpoint cannot be guessed.
		if _, err = LoadSTS(ctx, STSConfig{Regional: true, Region: unknown("")}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("regional: %v", err)
		}
	})
}
