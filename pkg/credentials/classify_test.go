package credentials

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go/aws/awserr"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
)

// TestDenialCause uses the messages of
// https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html.
func TestDenialCause(t *testing.T) {
	const who = "User: arn:aws:sts::123456789012:assumed-role/node/i-1 is not authorized to perform: "
	const role = " on resource: arn:aws:iam::123456789012:role/reader"
	for message, want := range map[string]string{
		who + "sts:AssumeRole" + role: "the role does not exist, or its trust policy does not allow this node sts:AssumeRole",
		who + "sts:AssumeRole" + role + " because no identity-based policy allows the sts:AssumeRole action": "this node lacks the permission sts:AssumeRole on the role",
		who + "sts:AssumeRole because no role trust policy allows the sts:AssumeRole action":                 "the role's trust policy does not allow this node sts:AssumeRole",
		who + "sts:AssumeRole" + role + " because no session policy allows the sts:AssumeRole action":        "STS refuses this node sts:AssumeRole because no session policy allows the sts:AssumeRole action",
		who + "sts:AssumeRole" + role + " with an explicit deny in a service control policy":                 "STS refuses this node sts:AssumeRole with an explicit deny in a service control policy",
		who + "sts:AssumeRole" + role + " with an explicit deny in an identity-based policy":                 "STS refuses this node sts:AssumeRole with an explicit deny in an identity-based policy",
		who + "sts:AssumeRole with an explicit deny in the role trust policy":                                "STS refuses this node sts:AssumeRole with an explicit deny in the role trust policy",
		who + "sts:TagSession" + role:                "the role's trust policy does not allow this node sts:TagSession",
		who + "sts:SetSourceIdentity" + role:         "the role's trust policy does not allow this node sts:SetSourceIdentity",
		"Roles may not be assumed by root accounts.": "",
	} {
		if e := classify(awserr.New("AccessDenied", message, nil)); e.Kind != Denied || e.Cause != want {
			t.Errorf("%s\n is %s, %q; want %q", message, e.Kind, e.Cause, want)
		}
	}
	if e := classify(awserr.New("NoSuchEntity", "The role with name reader cannot be found.", nil)); e.Cause != "the role does not exist" {
		t.Errorf("%+v", e)
	}
}

// assume returns the error of a call for the role reader.
func assume(t *testing.T, c STSConfig) *Error {
	t.Helper()
	_, err := client(t, c).AssumeRole(t.Context(), roles.Assumption{RoleARN: account + "reader", SessionName: "ns.pod", Duration: time.Hour})
	e, ok := errors.AsType[*Error](err)
	if !ok {
		t.Fatalf("%v is no *Error", err)
	}
	return e
}

func TestMissingRoleAndMissingPermissionDiffer(t *testing.T) {
	s := cloud(t)
	if e := assume(t, STSConfig{Endpoint: s.URL()}); !strings.Contains(e.Cause, "does not exist") {
		t.Errorf("no such role: %+v", e)
	}
	s.PutRole(sts.Role{ARN: account + "reader", Trusts: []string{nodeName}})
	s.PutPrincipal(sts.Principal{AccessKeyID: "AKIANODE000000000001", SecretAccessKey: "node-secret", ARN: nodeName, UserID: "AIDANODE", MayNotAssume: true})
	if e := assume(t, STSConfig{Endpoint: s.URL()}); !strings.Contains(e.Cause, "this node lacks the permission sts:AssumeRole") {
		t.Errorf("no permission: %+v", e)
	}
}

func TestClockDifferenceIsReported(t *testing.T) {
	for off, want := range map[time.Duration]string{23 * time.Minute: "23 minutes behind", -90 * time.Minute: "90 minutes ahead of"} {
		cloud(t) // sets the environment
		s, err := sts.Start(sts.Options{Now: func() time.Time { return time.Now().Add(off) }})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.PutPrincipal(sts.Principal{AccessKeyID: "AKIANODE000000000001", SecretAccessKey: "node-secret", ARN: nodeName, UserID: "AIDANODE"})
		for name, c := range map[string]STSConfig{
			"directly":       {Endpoint: s.URL()},
			"through a role": {Endpoint: s.URL(), IntermediateRole: account + "between", SessionName: "node"},
		} {
			if e := assume(t, c); e.Kind != ClockSkew || !strings.Contains(e.Cause, want) {
				t.Errorf("%s off, %s: %+v", off, name, e)
			}
		}
	}
	for _, message := range []string{
		"The request signature we calculated does not match the signature you provided.",
		"Signature expired: 20269999T999999Z is now earlier than 20260101T000000Z (20260101T001500Z - 15 min.)",
	} {
		if e := classify(awserr.New("SignatureDoesNotMatch", message, nil)); e.Kind != NodeCredentials || e.Cause != "" {
			t.Errorf("%s: %+v", message, e)
		}
	}
}

// TestExpiredRequestMeansClockSkew lets STS answer RequestExpired: a signature is valid for 15
// minutes.
// https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html
func TestExpiredRequestMeansClockSkew(t *testing.T) {
	for message, want := range map[string]string{
		"Request has expired.": "the node's clock and the clock of STS are more than 15 minutes apart",
		"Signature expired: 20260101T000000Z is now earlier than 20260101T000800Z (20260101T002300Z - 15 min.)": "the node's clock is 23 minutes behind the clock of STS",
	} {
		expired := awserr.New("RequestExpired", message, nil)
		for _, err := range []error{expired, awserr.New(intermediateCode, "", expired)} {
			if e := classify(err); e.Kind != ClockSkew || e.Cause != want {
				t.Errorf("%v: %+v, want %q", err, e, want)
			}
		}
	}
}

// TestRefusedIntermediateRoleIsReported lets STS refuse the role of --assume-role-arn, not the
// pod's.
func TestRefusedIntermediateRoleIsReported(t *testing.T) {
	s := cloud(t)
	s.PutRole(sts.Role{ARN: account + "between", Trusts: []string{account + "somebody"}})
	const refused = "STS refuses this node the role that --assume-role-arn names"
	if e := assume(t, STSConfig{Endpoint: s.URL(), IntermediateRole: account + "between", SessionName: "node"}); e.Kind != NodeCredentials ||
		!strings.HasPrefix(e.Cause, refused+": the role does not exist, or its trust policy does not allow this node") {
		t.Errorf("%+v", e)
	}
	for code, want := range map[string]string{"AccessDenied": refused, "ValidationError": refused, "InvalidClientTokenId": "", "NoCredentialProviders": ""} {
		if e := classify(awserr.New(intermediateCode, "", awserr.New(code, "", nil))); e.Kind != NodeCredentials || e.Cause != want {
			t.Errorf("%s: %+v, want %q", code, e, want)
		}
	}
}

func TestErrorHasMetadataServiceAnswer(t *testing.T) {
	s := cloud(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	m := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
			fmt.Fprint(w, "token")
			return
		}
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, "<html>\n<body>404 - Not Found</body>", strings.Repeat("x", 2*maxMessage))
	}))
	defer m.Close()
	e := assume(t, STSConfig{Endpoint: s.URL(), MetadataURL: m.URL})
	if e.Kind != NodeCredentials || !strings.Contains(e.Message, "no EC2 instance role found") || !strings.Contains(e.Message, "404 - Not Found") {
		t.Errorf("%+v", e)
	}
	if strings.Contains(e.Message, "Deprecated") || strings.ContainsAny(e.Message, "\n\t") || len(e.Message) > maxMessage {
		t.Errorf("%d bytes: %s", len(e.Message), e.Message)
	}
}
