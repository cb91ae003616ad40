package roles

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	roleKey = "iam.amazonaws.com/role"
	idKey   = "iam.amazonaws.com/external-id"
	base    = "arn:aws:iam::123456789012:role/"
)

func rules() Rules {
	return Rules{RoleKey: roleKey, ExternalIDKey: idKey, BaseARN: base, Duration: time.Hour}
}

func TestAssumption(t *testing.T) {
	for name, tt := range map[string]struct {
		annotations map[string]string
		want        Assumption
	}{
		"name":            {map[string]string{roleKey: "reader"}, Assumption{RoleARN: base + "reader"}},
		"name with path":  {map[string]string{roleKey: "team/reader"}, Assumption{RoleARN: base + "team/reader"}},
		"leading slash":   {map[string]string{roleKey: "/team/reader"}, Assumption{RoleARN: base + "team/reader"}},
		"ARN":             {map[string]string{roleKey: "arn:aws:iam::999999999999:role/other"}, Assumption{RoleARN: "arn:aws:iam::999999999999:role/other"}},
		"China":           {map[string]string{roleKey: "arn:aws-cn:iam::999999999999:role/other"}, Assumption{RoleARN: "arn:aws-cn:iam::999999999999:role/other"}},
		"GovCloud":        {map[string]string{roleKey: "arn:aws-us-gov:iam::999999999999:role/a/b/c"}, Assumption{RoleARN: "arn:aws-us-gov:iam::999999999999:role/a/b/c"}},
		"external ID":     {map[string]string{roleKey: "reader", idKey: "a:b/c"}, Assumption{RoleARN: base + "reader", ExternalID: "a:b/c"}},
		"default":         {map[string]string{"else": "x"}, Assumption{RoleARN: base + "fallback"}},
		"default with ID": {map[string]string{idKey: "id"}, Assumption{RoleARN: base + "fallback", ExternalID: "id"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := rules()
			r.DefaultRole = "fallback"
			got, err := r.Assumption(Subject{Namespace: "ns", Name: "pod", Annotations: tt.annotations})
			if err != nil {
				t.Fatal(err)
			}
			tt.want.SessionName, tt.want.Duration = "ns.pod", time.Hour
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestNoAnnotationAndNoDefaultRole(t *testing.T) {
	r := rules() // has a base ARN, which is not a role by itself (kube2iam returns it)
	for _, annotations := range []map[string]string{nil, {}, {idKey: "abc"}} {
		if a, err := r.Assumption(Subject{Namespace: "ns", Name: "pod", Annotations: annotations}); !errors.Is(err, ErrNoRole) {
			t.Errorf("annotations %v: %v, %v; want ErrNoRole", annotations, a, err)
		}
	}
}

func TestInvalidAnnotationNamesItsKey(t *testing.T) {
	for name, tt := range map[string]struct {
		annotations map[string]string
		key         string
	}{
		"empty":              {map[string]string{roleKey: ""}, roleKey},
		"blank":              {map[string]string{roleKey: " "}, roleKey},
		"newline":            {map[string]string{roleKey: "reader\n"}, roleKey},
		"trailing slash":     {map[string]string{roleKey: "reader/"}, roleKey},
		"a user's ARN":       {map[string]string{roleKey: "arn:aws:iam::123456789012:user/u"}, roleKey},
		"no account":         {map[string]string{roleKey: "arn:aws:iam:::role/reader"}, roleKey},
		"too long":           {map[string]string{roleKey: strings.Repeat("a/", 1200) + "b"}, roleKey},
		"bad character":      {map[string]string{roleKey: "re ader"}, roleKey},
		"external ID short":  {map[string]string{roleKey: "reader", idKey: "x"}, idKey},
		"external ID empty":  {map[string]string{roleKey: "reader", idKey: ""}, idKey},
		"external ID letter": {map[string]string{roleKey: "reader", idKey: "a b"}, idKey},
	} {
		t.Run(name, func(t *testing.T) {
			r := rules()
			r.DefaultRole = "fallback" // an invalid annotation never selects the default role
			a, err := r.Assumption(Subject{Namespace: "ns", Name: "pod", Annotations: tt.annotations})
			var invalid *InvalidError
			if !errors.As(err, &invalid) || invalid.Key != tt.key {
				t.Fatalf("%v, %v; want an InvalidError of %s", a, err, tt.key)
			}
			if len(err.Error()) > 400 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestRoleNameWithoutBaseARNIsInvalid(t *testing.T) {
	r := rules()
	r.BaseARN = ""
	var invalid *InvalidError
	if _, err := r.Assumption(Subject{Annotations: map[string]string{roleKey: "reader"}}); !errors.As(err, &invalid) {
		t.Fatalf("%v; want an InvalidError", err)
	}
}

func TestParseBaseARN(t *testing.T) {
	for in, want := range map[string]string{
		base:                          base,
		strings.TrimSuffix(base, "/"): base,
		"arn:aws-cn:iam::123456789012:role/team/x": "arn:aws-cn:iam::123456789012:role/team/x/",
	} {
		if got, err := ParseBaseARN(in); err != nil || got != want {
			t.Errorf("ParseBaseARN(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"", "role", "arn:aws:iam::1:role/", "arn:aws:s3:::bucket/"} {
		if got, err := ParseBaseARN(in); err == nil {
			t.Errorf("ParseBaseARN(%q) = %q; want an error", in, got)
		}
	}
}

func TestSessionNamesAreValidAndDistinct(t *testing.T) {
	if got := SessionName("default", "web-1"); got != "default.web-1" {
		t.Errorf("%q", got)
	}
	long := strings.Repeat("p", 80)
	seen := map[string]string{}
	for _, pod := range []string{long, long + "a", long + "b", "a_b", "a b", "a\x00b"} {
		name := SessionName("default", pod)
		if len(name) > 64 || len(name) < 2 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+=,.@-") != "" {
			t.Errorf("%q is not a session name", name)
		}
		if other, ok := seen[name]; ok {
			t.Errorf("%q and %q are both %q", pod, other, name)
		}
		seen[name] = pod
	}
}

func TestNamespaceRestriction(t *testing.T) {
	const key = "iam.amazonaws.com/allowed-roles"
	for _, tt := range []struct {
		format  Format
		role    string
		allowed string
		want    bool
	}{
		{Glob, "team-a", `["team-a"]`, true},
		{Glob, "team-a", `["arn:aws:iam::123456789012:role/team-a"]`, true},
		{Glob, "team-a", `["x","team-*"]`, true},
		{Glob, "team-a/b", `["team-*"]`, true},
		{Glob, "team-a", `["*"]`, true},
		{Glob, "team-a-admin", `["team-a"]`, false},
		{Glob, "other-team-a", `["team-a"]`, false},
		{Glob, "teamXa", `["team.a"]`, false},
		{Regexp, "team-a", `["team-a"]`, true},
		{Regexp, "team-a", `["team-(a|b)"]`, true},
		{Regexp, "team-a-admin", `["team-a"]`, false},
		{Regexp, "xteam-a", `["team-a"]`, false},
		{Regexp, "bad", `["a|bad"]`, true},
		{Regexp, "bad-admin", `["^a|bad$"]`, false},
		{Regexp, "bad", `["a)|(.*"]`, false},
		{Regexp, "arn:aws:iam::999999999999:role/team-a", `["team-a"]`, false},
		{Regexp, "arn:aws:iam::999999999999:role/team-a", `["arn:aws:iam::9+:role/team-a"]`, true},
		{Regexp, "arn:aws:iam::999999999999:role/team-a", `["^arn:aws:iam::9+:role/team-a$"]`, true},
		{Glob, "team-a", `[]`, false},
		{Glob, "team-a", ``, false},
		{Glob, "team-a", `null`, false},
		{Glob, "team-a", `[1]`, false},
		{Glob, "team-a", `["team-a",7]`, false},
		{Glob, "team-a", `["team-a",""]`, false},
		{Glob, "team-a", `team-a`, false},
		{Regexp, "team-a", `["team-a","("]`, false},
	} {
		t.Run(fmt.Sprintf("%s %s %s", tt.format, tt.role, tt.allowed), func(t *testing.T) {
			r := rules()
			r.Restriction = &Restriction{Key: key, Format: tt.format}
			_, err := r.Assumption(Subject{Namespace: "ns", Name: "pod", Annotations: map[string]string{roleKey: tt.role},
				NamespaceAnnotations: func() (map[string]string, error) { return map[string]string{key: tt.allowed}, nil }})
			if tt.want && err != nil || !tt.want && !errors.Is(err, ErrForbidden) {
				t.Errorf("%v; want allowed %v", err, tt.want)
			}
		})
	}
}

func TestUnknownNamespaceIsAnError(t *testing.T) {
	down := errors.New("down")
	r := rules()
	r.DefaultRole = "fallback"
	r.Restriction = &Restriction{Key: "k", Format: Glob}
	ask := func(annotations map[string]string, ns func() (map[string]string, error)) error {
		_, err := r.Assumption(Subject{Namespace: "ns", Name: "pod", Annotations: annotations, NamespaceAnnotations: ns})
		return err
	}
	broken := func() (map[string]string, error) { return nil, down }
	none := func() (map[string]string, error) { return nil, nil }
	if err := ask(map[string]string{roleKey: "a"}, broken); !errors.Is(err, down) {
		t.Errorf("namespace unknown: %v", err)
	}
	if err := ask(map[string]string{roleKey: "a"}, none); !errors.Is(err, ErrForbidden) {
		t.Errorf("namespace without annotation: %v", err)
	}
	if err := ask(nil, broken); err != nil {
		t.Errorf("the default role is restricted: %v", err)
	}
}
