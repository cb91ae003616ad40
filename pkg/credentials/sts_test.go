package credentials

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go/aws/awserr"
	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
)

const (
	account  = "arn:aws:iam::123456789012:role/"
	nodeName = account + "node"
)

// cloud returns a fake STS that accepts the credentials that it puts into the environment.
func cloud(t *testing.T) *sts.Server {
	t.Helper()
	for _, name := range []string{"AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "AWS_ROLE_ARN", "AWS_STS_REGIONAL_ENDPOINTS", "AWS_USE_FIPS_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_FULL_URI"} {
		t.Setenv(name, "")
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIANODE000000000001")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "node-secret")
	s, err := sts.Start(sts.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.PutPrincipal(sts.Principal{AccessKeyID: "AKIANODE000000000001", SecretAccessKey: "node-secret", ARN: nodeName, UserID: "AIDANODE"})
	return s
}

func client(t *testing.T, c STSConfig) *STS {
	t.Helper()
	s, err := LoadSTS(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAssumeRoleSendsAllParameters(t *testing.T) {
	s := cloud(t)
	s.PutRole(sts.Role{ARN: account + "team/reader", Trusts: []string{nodeName}, ExternalID: "id"})
	a := roles.Assumption{
		RoleARN: account + "team/reader", SessionName: "ns.pod", ExternalID: "id", Duration: time.Hour, SourceIdentity: "ns.pod",
		SessionPolicy: `{"Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}`,
		Tags:          roles.Tags{ClusterName: "prod", Namespace: "ns", ServiceAccount: "default", PodName: "pod", PodUID: "uid"},
	}
	creds, err := client(t, STSConfig{Endpoint: s.URL(), UserAgent: "kube2iam-cni/test"}).AssumeRole(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(creds.Expiration); !strings.HasPrefix(creds.AccessKeyID, "ASIA") || creds.SecretAccessKey == "" || creds.SessionToken == "" || left < 59*time.Minute || left > time.Hour {
		t.Errorf("%+v, %v left", creds, left)
	}
	got := s.Calls()[0]
	want := sts.Call{
		Time: got.Time, Action: "AssumeRole", Caller: nodeName, AccessKeyID: "AKIANODE000000000001", Region: "us-east-1", RoleARN: a.RoleARN, SessionName: a.SessionName,
		ExternalID: "id", SourceIdentity: "ns.pod", Policy: a.SessionPolicy, Duration: time.Hour, Issued: creds.AccessKeyID,
		Tags: map[string]string{"eks-cluster-name": "prod", "kubernetes-namespace": "ns", "kubernetes-service-account": "default",
			"kubernetes-pod-name": "pod", "kubernetes-pod-uid": "uid"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestIntermediateRole lets the node first assume a role. Only that role may assume the roles of
// pods.
func TestIntermediateRole(t *testing.T) {
	s := cloud(t)
	between, pods := account+"between", account+"reader"
	s.PutRole(sts.Role{ARN: pods, Trusts: []string{between}})
	a := roles.Assumption{RoleARN: pods, SessionName: "ns.pod", Duration: time.Hour}
	c := client(t, STSConfig{Endpoint: s.URL(), IntermediateRole: between, SessionName: "kube2iam.node-1"})

	_, err := c.AssumeRole(t.Context(), a)
	if e, ok := errors.AsType[*Error](err); !ok || e.Kind != NodeCredentials || !strings.Contains(e.Message, between) {
		t.Errorf("without the intermediate role: %v, want NodeCredentials that names it", err)
	}
	s.SetFault(sts.Throttled)
	_, err = c.AssumeRole(t.Context(), a)
	if e, ok := errors.AsType[*Error](err); !ok || e.Kind != Throttled {
		t.Errorf("throttled: %v", err)
	}
	s.SetFault(sts.Fault{})
	s.PutRole(sts.Role{ARN: between, Trusts: []string{nodeName}})
	s.ResetCalls()
	for range 3 {
		if _, err := c.AssumeRole(t.Context(), a); err != nil {
			t.Fatal(err)
		}
	}
	calls := s.Calls()
	if len(calls) != 4 || calls[0].RoleARN != between || calls[0].SessionName != "kube2iam.node-1" || calls[0].Duration != time.Hour {
		t.Fatalf("%+v, want one call for the intermediate role", calls)
	}
	for _, call := range calls[1:] {
		if call.AccessKeyID != calls[0].Issued || call.RoleARN != pods {
			t.Errorf("%+v, want it signed by the intermediate role", call)
		}
	}
	// STS ends the session early.
	s.Expire(calls[0].Issued)
	if _, err := c.AssumeRole(t.Context(), a); err != nil {
		t.Errorf("after STS ended the intermediate session: %v", err)
	}
	a.Duration = 2 * time.Hour
	if _, err = c.AssumeRole(t.Context(), a); err == nil || !strings.Contains(err.Error(), "1 hour session limit") {
		t.Errorf("a chained session of two hours: %v, want STS's refusal", err)
	}
}

func TestErrorsAreClassified(t *testing.T) {
	for name, tt := range map[string]struct {
		arrange func(*testing.T, *sts.Server)
		kind    Kind
		code    string
		calls   int
	}{
		"unknown role":      {func(_ *testing.T, s *sts.Server) { s.DeleteRole(account + "reader") }, Denied, "AccessDenied", 1},
		"throttled":         {func(_ *testing.T, s *sts.Server) { s.SetFault(sts.Throttled) }, Throttled, "Throttling", 1},
		"too many requests": {func(_ *testing.T, s *sts.Server) { s.SetFault(sts.Fault{Status: 429, Code: "Whatever"}) }, Throttled, "Whatever", 1},
		"no container keys": {func(t *testing.T, _ *sts.Server) {
			t.Setenv("AWS_ACCESS_KEY_ID", "")
			t.Setenv("AWS_SECRET_ACCESS_KEY", "")
			t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/")
		}, NodeCredentials, "NoCredentialProviders", 0},
		"unavailable":        {func(_ *testing.T, s *sts.Server) { s.SetFault(sts.Unavailable) }, Unavailable, "ServiceUnavailable", 2},
		"region disabled":    {func(_ *testing.T, s *sts.Server) { s.SetFault(sts.RegionDisabled) }, Denied, "RegionDisabledException", 1},
		"down":               {func(_ *testing.T, s *sts.Server) { s.Down() }, Unavailable, "RequestError", 0},
		"node's key wrong":   {func(t *testing.T, _ *sts.Server) { t.Setenv("AWS_SECRET_ACCESS_KEY", "other") }, NodeCredentials, "SignatureDoesNotMatch", 1},
		"node's key unknown": {func(t *testing.T, _ *sts.Server) { t.Setenv("AWS_ACCESS_KEY_ID", "AKIAOTHER") }, NodeCredentials, "InvalidClientTokenId", 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := cloud(t)
			s.PutRole(sts.Role{ARN: account + "reader", Trusts: []string{nodeName}})
			tt.arrange(t, s)
			_, err := client(t, STSConfig{Endpoint: s.URL()}).AssumeRole(t.Context(), roles.Assumption{RoleARN: account + "reader", SessionName: "ns.pod", Duration: time.Hour})
			e, ok := errors.AsType[*Error](err)
			if !ok || e.Kind != tt.kind || e.Code != tt.code {
				t.Errorf("%v; want %s, %s", err, tt.kind, tt.code)
			}
			if n := len(s.Calls()); n != tt.calls {
				t.Errorf("%d calls, want %d", n, tt.calls)
			}
			if err != nil && strings.Contains(err.Error(), "node-secret") {
				t.Errorf("a secret in the error: %v", err)
			}
		})
	}
}

// TestProviderErrorsMeanNodeCredentials uses the errors of the SDK's single providers. The chain
// returns such an error if the provider has succeeded before.
func TestProviderErrorsMeanNodeCredentials(t *testing.T) {
	for _, code := range []string{"EC2RoleRequestError", "CredentialsEndpointError", "SharedCredsLoad", "WebIdentityErr", "ExpiredToken"} {
		if e := classify(awserr.New(code, "no", nil)); e.Kind != NodeCredentials {
			t.Errorf("%s is %s", code, e.Kind)
		}
	}
}

func TestExternalIDMustBeTheRoles(t *testing.T) {
	s := cloud(t)
	s.PutRole(sts.Role{ARN: account + "reader", Trusts: []string{nodeName}, ExternalID: "right"})
	c := client(t, STSConfig{Endpoint: s.URL()})
	for id, want := range map[string]bool{"": false, "wrong": false, "right": true} {
		_, err := c.AssumeRole(t.Context(), roles.Assumption{RoleARN: account + "reader", SessionName: "ns.pod", ExternalID: id, Duration: time.Hour})
		if (err == nil) != want {
			t.Errorf("external ID %q: %v", id, err)
		}
	}
}

// metadata returns a metadata service that issues numbered credentials of the node's role.
func metadata(t *testing.T, given *atomic.Int64) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/latest/api/token":
			w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
			fmt.Fprint(w, "token")
		case "/latest/meta-data/iam/security-credentials/":
			fmt.Fprint(w, "node")
		case "/latest/meta-data/iam/security-credentials/node":
			n := given.Add(1)
			fmt.Fprintf(w, `{"Code":"Success","AccessKeyId":"ASIANODE%d","SecretAccessKey":"s","Token":"t","Expiration":"2099-01-01T00:00:00Z"}`, n)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func TestExpiredNodeCredentialsAreRenewed(t *testing.T) {
	s := cloud(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	var given atomic.Int64
	m := metadata(t, &given)
	// The metadata service calls the first credentials valid; for STS they have expired.
	s.PutPrincipal(sts.Principal{AccessKeyID: "ASIANODE1", SecretAccessKey: "s", SessionToken: "t", ARN: nodeName, UserID: "x", Expires: time.Unix(1, 0)})
	s.PutPrincipal(sts.Principal{AccessKeyID: "ASIANODE2", SecretAccessKey: "s", SessionToken: "t", ARN: nodeName, UserID: "x"})
	s.PutRole(sts.Role{ARN: account + "reader", Trusts: []string{nodeName}})
	c := client(t, STSConfig{Endpoint: s.URL(), MetadataURL: m.URL})
	if _, err := c.AssumeRole(t.Context(), roles.Assumption{RoleARN: account + "reader", SessionName: "ns.pod", Duration: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if given.Load() != 2 {
		t.Errorf("the node's credentials were fetched %d times, want 2", given.Load())
	}
}

func TestSharedCredentialsFileIsRead(t *testing.T) {
	s := cloud(t)
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	if err := os.MkdirAll(filepath.Join(home, ".aws"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, ".aws", "credentials"), []byte("[default]\naws_access_key_id = AKIANODE000000000001\naws_secret_access_key = node-secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.PutRole(sts.Role{ARN: account + "reader", Trusts: []string{nodeName}})
	if _, err := client(t, STSConfig{Endpoint: s.URL()}).AssumeRole(t.Context(), roles.Assumption{RoleARN: account + "reader", SessionName: "ns.pod", Duration: time.Hour}); err != nil {
		t.Error(err)
	}
}

func TestIntermediateRoleIsRenewed(t *testing.T) {
	s := cloud(t)
	between := account + "between"
	s.PutRole(sts.Role{ARN: account + "reader", Trusts: []string{between}})
	s.PutRole(sts.Role{ARN: between, Trusts: []string{nodeName}})
	a := roles.Assumption{RoleARN: account + "reader", SessionName: "ns.pod", Duration: time.Hour}
	c := client(t, STSConfig{Endpoint: s.URL(), IntermediateRole: between, SessionName: "kube2iam.node-1"})
	if _, err := c.AssumeRole(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if at, err := c.client.Config.Credentials.ExpiresAt(); err != nil || time.Until(at) > MaxChained-intermediateMargin {
		t.Errorf("in %v, %v", time.Until(at), err)
	}
	c.client.Config.Credentials.Expire()
	s.SetFault(sts.Unavailable)
	_, err := c.AssumeRole(t.Context(), a)
	if e, ok := errors.AsType[*Error](err); !ok || e.Kind != Unavailable {
		t.Errorf("%v, want Unavailable", err)
	}
}

func TestIncompleteResponse(t *testing.T) {
	cloud(t)
	all := []string{"<AccessKeyId>ASIA1</AccessKeyId>", "<SecretAccessKey>s</SecretAccessKey>", "<SessionToken>t</SessionToken>", "<Expiration>2099-01-01T00:00:00Z</Expiration>"}
	for i := range len(all) + 1 {
		some := strings.Join(slices.Delete(slices.Clone(all), min(i, len(all)-1), min(i+1, len(all))), "")
		if i == len(all) {
			some = strings.Join(all, "")
		}
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "<AssumeRoleResponse><AssumeRoleResult><Credentials>"+some+"</Credentials></AssumeRoleResult></AssumeRoleResponse>")
		}))
		_, err := client(t, STSConfig{Endpoint: s.URL}).AssumeRole(t.Context(), roles.Assumption{RoleARN: account + "reader", SessionName: "ns.pod", Duration: time.Hour})
		s.Close()
		if e, ok := errors.AsType[*Error](err); (i < len(all)) != (ok && e.Code == "IncompleteResponse") || i == len(all) && err != nil {
			t.Errorf("%s: %v", some, err)
		}
	}
}
