package roles

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	nameKey   = "iam.amazonaws.com/session-name"
	policyKey = "iam.amazonaws.com/session-policy"
)

func sessionRules(change func(*Rules)) *Rules {
	r := rules()
	r.SessionNameKey, r.SessionPolicyKey, r.Node = nameKey, policyKey, "node-1"
	if change != nil {
		change(&r)
	}
	return &r
}

func subject(annotations map[string]string) Subject {
	all := map[string]string{roleKey: "reader"}
	for k, v := range annotations {
		all[k] = v
	}
	return Subject{Namespace: "ns", Name: "pod", UID: "uid", ServiceAccount: "account", Annotations: all}
}

func TestSessionParameters(t *testing.T) {
	cluster := &Tags{ClusterName: "prod", ClusterARN: "arn:aws:eks:us-east-1:123456789012:cluster/prod"}
	for name, tt := range map[string]struct {
		annotations map[string]string
		with        func(*Rules)
		want        Assumption
	}{
		"by default": {nil, nil, Assumption{SessionName: "ns.pod"}},
		"a name":     {map[string]string{nameKey: "nightly"}, nil, Assumption{SessionName: "nightly"}},
		"the default name of a pod in its namespace": {map[string]string{nameKey: "ns.other"}, nil, Assumption{SessionName: "ns.other"}},
		"a source identity":                          {nil, func(r *Rules) { r.SourceIdentity = true }, Assumption{SessionName: "ns.pod", SourceIdentity: "ns.pod"}},
		"a source identity with a chosen name": {map[string]string{nameKey: "nightly"}, func(r *Rules) { r.SourceIdentity = true },
			Assumption{SessionName: "nightly", SourceIdentity: "ns.pod"}},
		"role scope":            {nil, func(r *Rules) { r.Scope = RoleScope }, Assumption{SessionName: "_kube2iam.node-1"}},
		"a name and role scope": {map[string]string{nameKey: "nightly"}, func(r *Rules) { r.Scope = RoleScope }, Assumption{SessionName: "nightly"}},
		"tags": {nil, func(r *Rules) { r.Tags = cluster }, Assumption{SessionName: "ns.pod", Tags: Tags{
			ClusterName: "prod", ClusterARN: cluster.ClusterARN, Namespace: "ns", ServiceAccount: "account", PodName: "pod", PodUID: "uid"}}},
		"tags and role scope": {nil, func(r *Rules) { r.Tags, r.Scope = new(Tags), RoleScope }, Assumption{SessionName: "_kube2iam.node-1",
			Tags: Tags{Namespace: "ns", ServiceAccount: "account"}}},
		"a policy": {map[string]string{policyKey: "{\n \"Statement\": [ {\"Effect\": \"Deny\", \"Sid\": \"a b\"} ]\n}\n"}, nil,
			Assumption{SessionName: "ns.pod", SessionPolicy: `{"Statement":[{"Effect":"Deny","Sid":"a b"}]}`}},
		"the longest policy": {map[string]string{policyKey: `{"Statement":"` + strings.Repeat(" é", 1000) + `"}  `}, nil,
			Assumption{SessionName: "ns.pod", SessionPolicy: `{"Statement":"` + strings.Repeat(" é", 1000) + `"}`}},
	} {
		t.Run(name, func(t *testing.T) {
			r := sessionRules(tt.with)
			got, err := r.Assumption(subject(tt.annotations))
			if err != nil {
				t.Fatal(err)
			}
			tt.want.RoleARN, tt.want.Duration = base+"reader", r.Duration
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestInvalidSessionAnnotations(t *testing.T) {
	for name, tt := range map[string]struct{ key, value string }{
		"a name of one letter":               {nameKey, "a"},
		"an empty name":                      {nameKey, ""},
		"a long name":                        {nameKey, strings.Repeat("a", 65)},
		"a name with a space":                {nameKey, "a b"},
		"another pod's name":                 {nameKey, "kube-system.admin"},
		"an empty prefix":                    {nameKey, ".pod"},
		"another namespace's shortened name": {nameKey, SessionName(strings.Repeat("n", 60), "pod")},
		"an empty policy":                    {policyKey, ""},
		"no JSON":                            {policyKey, "allow all"},
		"no object":                          {policyKey, `["Statement"]`},
		"no statement":                       {policyKey, `{"Version":"2012-10-17"}`},
		"two JSON values":                    {policyKey, `{"Statement":[]}{"Statement":[]}`},
		"a long policy":                      {policyKey, `{"Statement":"` + strings.Repeat("a", 2048) + `"}`},
		"a policy in another alphabet":       {policyKey, `{"Statement":"ą"}`},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := sessionRules(nil).Assumption(subject(map[string]string{tt.key: tt.value}))
			if invalid, ok := errors.AsType[*InvalidError](err); !ok || invalid.Key != tt.key {
				t.Errorf("%v, %v; want an InvalidError of %s", a, err, tt.key)
			}
		})
	}
	if ValidateTagValue("prod-1: a/b=c@d") != nil || ValidateTagValue("a*") == nil || ValidateTagValue(strings.Repeat("a", 257)) == nil {
		t.Error("tag values are not limited as by STS")
	}
}

// TestPodCannotUseNodeSessionName tries namespaces that resemble the prefix of node session names.
func TestPodCannotUseNodeSessionName(t *testing.T) {
	node := NodeSessionName("node-1")
	for _, namespace := range []string{"kube2iam", "ns"} {
		if SessionName(namespace, "node-1") == node {
			t.Errorf("the pod node-1 of %s has it by default", namespace)
		}
		if err := validateSessionName(node, namespace); err == nil {
			t.Errorf("a pod of %s may choose it", namespace)
		}
	}
}

func TestErrorOmitsExternalID(t *testing.T) {
	r := sessionRules(func(r *Rules) { r.ExternalIDKey = "id" })
	if _, err := r.Assumption(subject(map[string]string{"id": "se cret"})); err == nil || strings.Contains(err.Error(), "se cret") {
		t.Errorf("%v", err)
	}
}

func TestUnsetTagsAreOmitted(t *testing.T) {
	var got []string
	Tags{Namespace: "ns", PodUID: "uid", ClusterName: "prod"}.Each(func(key, value string) { got = append(got, key+"="+value) })
	if d := cmp.Diff([]string{"eks-cluster-name=prod", "kubernetes-namespace=ns", "kubernetes-pod-uid=uid"}, got); d != "" {
		t.Error(d)
	}
}

func TestPermittedAnnotation(t *testing.T) {
	const key = "iam.amazonaws.com/allowed-roles"
	both := func(list, expr string) map[string]string { return map[string]string{key: list, PermittedKey: expr} }
	only := func(expr string) map[string]string { return map[string]string{PermittedKey: expr} }
	for name, tt := range map[string]struct {
		role      string
		namespace map[string]string
		want      bool
	}{
		"its name":                     {"team-a", only("team-a"), true},
		"anchored in the annotation":   {"team-a", only("^team-.*$"), true},
		"all":                          {"team/a", only(".*"), true},
		"an alternative, not anchored": {"b", only("^a|b$"), true},
		"longer than an alternative":   {"bad", only("^a|b$"), false},
		"a prefix":                     {"team-admin", only("team"), false},
		"empty":                        {"team-a", only(""), false},
		"malformed":                    {"team-a", only("("), false},
		"an ARN":                       {"arn:aws:iam::999999999999:role/x", only("arn:aws:iam::999999999999:role/.*"), true},
		"another account's":            {"arn:aws:iam::999999999999:role/team-a", only("team-a"), false},
		"all, another account's":       {"arn:aws:iam::999999999999:role/team-a", only(".*"), false},
		"both":                         {"team-a", both(`["team-*"]`, "team-.*"), true},
		"the list only":                {"team-a", both(`["team-*"]`, "other"), false},
		"permitted only":               {"team-a", both(`[]`, "team-.*"), false},
		"neither":                      {"team-a", nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := rules()
			r.Restriction = &Restriction{Key: key, Format: Glob}
			_, err := r.Assumption(Subject{Namespace: "ns", Name: "pod", Annotations: map[string]string{roleKey: tt.role},
				NamespaceAnnotations: func() (map[string]string, error) { return tt.namespace, nil }})
			if tt.want && err != nil || !tt.want && !errors.Is(err, ErrForbidden) {
				t.Errorf("%v; want allowed %v", err, tt.want)
			}
		})
	}
}

func TestLengthLimits(t *testing.T) {
	whole := "ns." + strings.Repeat("x", 61)
	if got := SessionName("ns", whole[3:]); got != whole {
		t.Errorf("a name of 64 bytes is shortened: %s", got)
	}
	for name, ok := range map[string]bool{
		"x=0123456789abcdef": false, "ns.x=0123456789abcdef": true, "x=0123456789abcdeg": true,
	} {
		if err := validateSessionName(name, "ns"); (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := ValidateTagValue(strings.Repeat("ä", 256)); err != nil {
		t.Error(err)
	}
	for n, ok := range map[int]bool{1224: true, 1225: false} {
		if err := validateExternalID(strings.Repeat("x", n)); (err == nil) != ok {
			t.Errorf("an external ID of %d: %v", n, err)
		}
	}
	frame := `{"Statement":""}`
	for n, ok := range map[int]bool{2048: true, 2049: false} {
		text := strings.Replace(frame, `""`, `"`+strings.Repeat("x", n-len(frame))+`"`, 1)
		if _, err := parseSessionPolicy(text); (err == nil) != ok {
			t.Errorf("a policy of %d: %v", len(text), err)
		}
	}
}

func TestFirstInvalidAnnotationIsReported(t *testing.T) {
	r := &Rules{RoleKey: "role", SessionNameKey: "session", ExternalIDKey: "id", Duration: time.Hour}
	_, err := r.Assumption(Subject{Namespace: "ns", Annotations: map[string]string{"role": "arn:aws:iam::123456789012:role/a", "session": "!", "id": "!"}})
	if e, ok := errors.AsType[*InvalidError](err); !ok || e.Key != "session" {
		t.Error(err)
	}
}
