package sts

import (
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/awserr"
	"github.com/aws/aws-sdk-go/aws/credentials"
	"github.com/aws/aws-sdk-go/aws/session"
	awssts "github.com/aws/aws-sdk-go/service/sts"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const (
	nodeRole = "arn:aws:iam::123456789012:role/node"
	appRole  = "arn:aws:iam::123456789012:role/team/app"
)

var node = Principal{
	AccessKeyID:     "ASIANODE0000000000000",
	SecretAccessKey: "node/secret+key",
	SessionToken:    "node//token+==",
	ARN:             "arn:aws:sts::123456789012:assumed-role/node/i-0123456789abcdef0",
	UserID:          "AROANODE:i-0123456789abcdef0",
}

// clock is the server's time, which a test sets.
type clock struct{ offset time.Duration }

func (c *clock) now() time.Time { return time.Now().Add(c.offset) }

func start(t *testing.T) (*Server, *clock) {
	t.Helper()
	c := &clock{}
	s, err := Start(Options{Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.PutPrincipal(node)
	s.PutRole(Role{ARN: appRole, Trusts: []string{nodeRole}})
	return s, c
}

// client is AWS's own, with the principal's credentials and without retries.
func client(t *testing.T, s *Server, p Principal) *awssts.STS {
	t.Helper()
	sess, err := session.NewSession(&aws.Config{
		Region:      aws.String("eu-central-1"),
		Endpoint:    aws.String(s.URL()),
		Credentials: credentials.NewStaticCredentials(p.AccessKeyID, p.SecretAccessKey, p.SessionToken),
		MaxRetries:  aws.Int(0),
	})
	if err != nil {
		t.Fatal(err)
	}
	return awssts.New(sess)
}

func assume(role, name string) *awssts.AssumeRoleInput {
	return &awssts.AssumeRoleInput{RoleArn: aws.String(role), RoleSessionName: aws.String(name)}
}

// wantError checks an error of the client's: AWS's code, the HTTP status and a part of the message.
func wantError(t *testing.T, err error, status int, code, message string) {
	t.Helper()
	var failure awserr.RequestFailure
	if !errors.As(err, &failure) {
		t.Errorf("%v, want %d %s", err, status, code)
		return
	}
	if failure.StatusCode() != status || failure.Code() != code || !strings.Contains(failure.Message(), message) || failure.RequestID() == "" {
		t.Errorf("%v, want %d %s with %q", err, status, code, message)
	}
}

func TestAssumeRoleAndUseIt(t *testing.T) {
	s, c := start(t)
	in := assume(appRole, "default.web-0")
	in.DurationSeconds = aws.Int64(900)
	in.Policy = aws.String(`{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"s3:Get*","Resource":"*"}}`)
	in.SourceIdentity = aws.String("web-0")
	in.Tags = []*awssts.Tag{{Key: aws.String("kubernetes-namespace"), Value: aws.String("default + more = all")}}
	in.ExternalId = aws.String("any")
	before := time.Now().Truncate(time.Second)
	out, err := client(t, s, node).AssumeRole(in)
	if err != nil {
		t.Fatal(err)
	}
	if got := aws.StringValue(out.AssumedRoleUser.Arn); got != "arn:aws:sts::123456789012:assumed-role/app/default.web-0" {
		t.Errorf("assumed role user %s", got)
	}
	if aws.StringValue(out.SourceIdentity) != "web-0" || aws.Int64Value(out.PackedPolicySize) < 1 {
		t.Errorf("source identity %s, packed %d", aws.StringValue(out.SourceIdentity), aws.Int64Value(out.PackedPolicySize))
	}
	if got := out.Credentials.Expiration.Sub(before); got < 15*time.Minute || got > 16*time.Minute {
		t.Errorf("expires after %s, want 15 minutes", got)
	}

	vended := Principal{
		AccessKeyID:     *out.Credentials.AccessKeyId,
		SecretAccessKey: *out.Credentials.SecretAccessKey,
		SessionToken:    *out.Credentials.SessionToken,
	}
	me, err := client(t, s, vended).GetCallerIdentity(nil)
	if err != nil {
		t.Fatal(err)
	}
	if *me.Arn != *out.AssumedRoleUser.Arn || *me.UserId != *out.AssumedRoleUser.AssumedRoleId || *me.Account != "123456789012" {
		t.Errorf("the session is %v", me)
	}
	want := []Call{
		{
			Action: "AssumeRole", Caller: node.ARN, AccessKeyID: node.AccessKeyID, Region: "eu-central-1", RoleARN: appRole,
			SessionName: "default.web-0", ExternalID: "any", SourceIdentity: "web-0", Policy: *in.Policy, Duration: 15 * time.Minute,
			Tags: map[string]string{"kubernetes-namespace": "default + more = all"}, Issued: vended.AccessKeyID,
		},
		{Action: "GetCallerIdentity", Caller: *me.Arn, AccessKeyID: vended.AccessKeyID, Region: "eu-central-1"},
	}
	if diff := cmp.Diff(want, s.Calls(), cmpopts.IgnoreFields(Call{}, "Time")); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}

	again, err := client(t, s, node).AssumeRole(in)
	if err != nil {
		t.Fatal(err)
	}
	if *again.Credentials.AccessKeyId == vended.AccessKeyID || *again.Credentials.SecretAccessKey == vended.SecretAccessKey {
		t.Error("two sessions have the same credentials")
	}

	// The SDK's client signs by the machine's clock, which the server would take for skew; its
	// signer takes any.
	c.offset = 16 * time.Minute
	req := sign(t, s, vended, http.MethodPost, "Action=GetCallerIdentity&Version=2011-06-15", c.now())
	if status, code, message := send(t, req); status != 403 || code != "ExpiredToken" {
		t.Errorf("16 minutes on: %d %s: %s, want 403 ExpiredToken", status, code, message)
	}
}

func TestTrust(t *testing.T) {
	s, _ := start(t)
	role := func(name string) string { return "arn:aws:iam::123456789012:role/" + name }
	s.PutRole(Role{ARN: role("session"), Trusts: []string{node.ARN}})
	s.PutRole(Role{ARN: role("root"), Trusts: []string{"arn:aws:iam::123456789012:root"}})
	s.PutRole(Role{ARN: role("account"), Trusts: []string{"123456789012"}})
	s.PutRole(Role{ARN: role("other"), Trusts: []string{role("nod"), role("node2"), "arn:aws:iam::999999999999:role/node", "arn:aws:iam::999999999999:root"}})
	s.PutRole(Role{ARN: role("external"), Trusts: []string{nodeRole}, ExternalID: "team/a:1"})
	s.PutRole(Role{ARN: role("untagged"), Trusts: []string{nodeRole}, RefusesTags: true})
	s.PutRole(Role{ARN: role("unsourced"), Trusts: []string{nodeRole}, RefusesSourceIdentity: true})
	for _, test := range []struct {
		name, role string
		change     func(*awssts.AssumeRoleInput)
		denied     string
	}{
		{name: "by role, under a path", role: appRole},
		{name: "by session", role: role("session")},
		{name: "by account root", role: role("root")},
		{name: "by account number", role: role("account")},
		{name: "others only", role: role("other"), denied: "sts:AssumeRole"},
		{name: "no such role", role: role("none"), denied: "sts:AssumeRole"},
		{name: "external ID", role: role("external"), change: func(in *awssts.AssumeRoleInput) { in.ExternalId = aws.String("team/a:1") }},
		{name: "wrong external ID", role: role("external"), change: func(in *awssts.AssumeRoleInput) { in.ExternalId = aws.String("team/a:2") }, denied: "sts:AssumeRole"},
		{name: "no external ID", role: role("external"), denied: "sts:AssumeRole"},
		{name: "tags refused", role: role("untagged"), change: func(in *awssts.AssumeRoleInput) {
			in.Tags = []*awssts.Tag{{Key: aws.String("k"), Value: aws.String("v")}}
		}, denied: "sts:TagSession"},
		{name: "source identity refused", role: role("unsourced"), change: func(in *awssts.AssumeRoleInput) {
			in.SourceIdentity = aws.String("me")
		}, denied: "sts:SetSourceIdentity"},
	} {
		t.Run(test.name, func(t *testing.T) {
			in := assume(test.role, "default.web-0")
			if test.change != nil {
				test.change(in)
			}
			_, err := client(t, s, node).AssumeRole(in)
			if test.denied == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, 403, "AccessDenied", "User: "+node.ARN+" is not authorized to perform: "+test.denied+" on resource: "+test.role)
		})
	}
}

func TestLimits(t *testing.T) {
	s, _ := start(t)
	s.PutRole(Role{ARN: appRole, Trusts: []string{nodeRole, appRole}, MaxDuration: 2 * time.Hour})
	for _, test := range []struct {
		name, set, value string
		code, message    string
	}{
		{"session name of 1", "RoleSessionName", "a", "ValidationError", "Value 'a' at 'roleSessionName' failed to satisfy constraint: Member must have length greater than or equal to 2"},
		{"session name of 2", "RoleSessionName", "ab", "", ""},
		{"session name of 64", "RoleSessionName", strings.Repeat("a", 64), "", ""},
		{"session name of 65", "RoleSessionName", strings.Repeat("a", 65), "ValidationError", "Member must have length less than or equal to 64"},
		{"session name with a slash", "RoleSessionName", "default/web-0", "ValidationError", `pattern: [\w+=,.@-]*`},
		{"no session name", "RoleSessionName", "", "ValidationError", "Value null at 'roleSessionName'"},
		{"external ID of 1", "ExternalId", "a", "ValidationError", "externalId"},
		{"external ID of 1224", "ExternalId", strings.Repeat("a", 1224), "", ""},
		{"external ID of 1225", "ExternalId", strings.Repeat("a", 1225), "ValidationError", "externalId"},
		{"external ID with a blank", "ExternalId", "a b", "ValidationError", "externalId"},
		{"source identity with a slash", "SourceIdentity", "a/b", "ValidationError", "sourceIdentity"},
		{"role ARN of 19", "RoleArn", "arn:aws:iam::1:role", "ValidationError", "greater than or equal to 20"},
		{"role ARN of a user", "RoleArn", "arn:aws:iam::123456789012:user/app", "ValidationError", "is invalid"},
		{"bare base ARN", "RoleArn", "arn:aws:iam::123456789012:role/", "ValidationError", "is invalid"},
		{"899 s", "DurationSeconds", "899", "ValidationError", "greater than or equal to 900"},
		{"900 s", "DurationSeconds", "900", "", ""},
		{"the role's maximum", "DurationSeconds", "7200", "", ""},
		{"beyond the role's maximum", "DurationSeconds", "7201", "ValidationError", "exceeds the MaxSessionDuration set for this role"},
		{"43201 s", "DurationSeconds", "43201", "ValidationError", "less than or equal to 43200"},
		{"policy that is no JSON", "Policy", "{", "MalformedPolicyDocument", ""},
		{"policy without statements", "Policy", `{"Version":"2012-10-17"}`, "MalformedPolicyDocument", ""},
		{"policy of 2049", "Policy", `{"Statement":[]}` + strings.Repeat(" ", 2033), "ValidationError", "policy"},
		{"tag key of 129", "Tags.member.1.Key", strings.Repeat("k", 129), "ValidationError", "less than or equal to 128"},
	} {
		t.Run(test.name, func(t *testing.T) {
			params := url.Values{
				"Action": {"AssumeRole"}, "Version": {"2011-06-15"}, "RoleArn": {appRole}, "RoleSessionName": {"default.web-0"},
			}
			params.Set(test.set, test.value)
			if test.value == "" {
				params.Del(test.set)
			}
			status, code, message := send(t, sign(t, s, node, http.MethodPost, params.Encode(), time.Now()))
			if wantStatus := map[bool]int{true: 200, false: 400}[test.code == ""]; status != wantStatus || code != test.code {
				t.Errorf("%d %s: %s, want %d %s", status, code, message, wantStatus, test.code)
			}
			if !strings.Contains(message, test.message) {
				t.Errorf("message %q, want %q in it", message, test.message)
			}
		})
	}
	t.Run("chained", func(t *testing.T) {
		out, err := client(t, s, node).AssumeRole(assume(appRole, "first"))
		if err != nil {
			t.Fatal(err)
		}
		first := client(t, s, Principal{
			AccessKeyID: *out.Credentials.AccessKeyId, SecretAccessKey: *out.Credentials.SecretAccessKey, SessionToken: *out.Credentials.SessionToken,
		})
		in := assume(appRole, "second")
		in.DurationSeconds = aws.Int64(3601)
		_, err = first.AssumeRole(in)
		wantError(t, err, 400, "ValidationError", "role chaining")
		in.DurationSeconds = aws.Int64(3600)
		if _, err := first.AssumeRole(in); err != nil {
			t.Error(err)
		}
	})
	t.Run("duplicate tags", func(t *testing.T) {
		in := assume(appRole, "tagged")
		in.Tags = []*awssts.Tag{{Key: aws.String("team"), Value: aws.String("a")}, {Key: aws.String("Team"), Value: aws.String("b")}}
		_, err := client(t, s, node).AssumeRole(in)
		wantError(t, err, 400, "InvalidParameterValue", "Duplicate tag keys")
	})
}

func TestFaults(t *testing.T) {
	s, _ := start(t)
	c := client(t, s, node)
	for _, test := range []struct {
		fault  Fault
		status int
		code   string
	}{
		{Throttled, 400, "Throttling"},
		{Unavailable, 503, "ServiceUnavailable"},
		{Internal, 500, "InternalFailure"},
		{Expired, 403, "ExpiredToken"},
		{RegionDisabled, 403, "RegionDisabledException"},
	} {
		s.SetFault(test.fault)
		_, err := c.AssumeRole(assume(appRole, "default.web-0"))
		wantError(t, err, test.status, test.code, "")
	}
	s.SetFault(Fault{Latency: 30 * time.Millisecond})
	begun := time.Now()
	if _, err := c.GetCallerIdentity(nil); err != nil || time.Since(begun) < 30*time.Millisecond {
		t.Errorf("with 30 ms latency: %v after %s", err, time.Since(begun))
	}
	s.SetFault(Fault{})
	s.Down()
	if _, err := c.GetCallerIdentity(nil); err == nil {
		t.Error("a server that is down answered")
	}
	if err := s.Up(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.GetCallerIdentity(nil); err != nil {
		t.Errorf("back up: %v", err)
	}
	s.DeleteRole(appRole)
	_, err := c.AssumeRole(assume(appRole, "default.web-0"))
	wantError(t, err, 403, "AccessDenied", "")
	codes := []string{}
	for _, call := range s.Calls() {
		codes = append(codes, call.Code)
	}
	want := []string{"Throttling", "ServiceUnavailable", "InternalFailure", "ExpiredToken", "RegionDisabledException", "", "", "AccessDenied"}
	if diff := cmp.Diff(want, codes); diff != "" {
		t.Errorf("calls on record (-want +got):\n%s", diff)
	}
	s.ResetCalls()
	if len(s.Calls()) != 0 {
		t.Error("calls are still on record")
	}
}
