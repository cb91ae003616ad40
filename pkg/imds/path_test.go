package imds

import (
	"net/url"
	"strings"
	"testing"
)

func TestIMDS02PathsHaveOneSpelling(t *testing.T) {
	for in, want := range map[string]string{
		"/":                                  "/",
		"//":                                 "/",
		"/latest/meta-data/":                 "/latest/meta-data/",
		"/latest/meta-data":                  "/latest/meta-data",
		"//latest//meta-data//instance-id":   "/latest/meta-data/instance-id",
		"/latest/./meta-data/../meta-data/x": "/latest/meta-data/x",
		"/latest/meta-data/..":               "/latest/",
		"/latest;a=b/meta-data;x/iam":        "/latest/meta-data/iam",
		"/latest/%6deta-data/x":              "/latest/meta-data/x",
		"/latest%2Fmeta-data%2fx":            "/latest/meta-data/x",
		"/latest/%252e%252e/x":               "/x",
		"/latest/meta-data/tags/instance/a@b:c+d=e,f": "/latest/meta-data/tags/instance/a@b:c+d=e,f",
	} {
		got, ok := canonical(in)
		if !ok || got != want {
			t.Errorf("canonical(%q) = %q, %v; want %q", in, got, ok, want)
		}
		if again, ok := canonical(got); !ok || again != got {
			t.Errorf("canonical(%q) = %q: not a fixed point", got, again)
		}
	}
	for _, in := range []string{"", "*", "latest", "/..", "/latest/../..", "/a\\b", "/a\x00b", "/a b", "/ä", "/%", "/%zz", "/%2525252541",
		"/a?b", "/a#b", "/" + strings.Repeat("a", 2000)} {
		if got, ok := canonical(in); ok {
			t.Errorf("canonical(%q) = %q; want none", in, got)
		}
	}
}

// FuzzCredentialsPathsAreNeverForwarded holds the promise for any path: what is forwarded names no credentials, however
// often and by whatever rules the node's service decodes it once more.
func FuzzCredentialsPathsAreNeverForwarded(f *testing.F) {
	for _, seed := range []string{
		"/latest/meta-data/iam/security-credentials/", "/latest/meta-data/iam/info", "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
		"/latest/meta-data/iam%2Fsecurity-credentials", "/latest/meta-data/iam%252Fsecurity-credentials", "/latest/meta-data/IAM/Security-Credentials/x",
		"/latest/meta-data/iam;x/security-credentials", "/latest/./meta-data//iam/../iam/security-credentials-extended/x", "/2021-01-03/meta-data/i%61m/info",
		"/latest/meta-data/iam\x00/security-credentials", "/latest/meta-data/ｉam/", "/latest/meta-data/iam%20/", "/x/../latest/meta-data/%69am", "/latest\\meta-data\\iam",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		path, ok := canonical(raw)
		if !ok {
			return
		}
		if to, _ := routeOf(path); to != forwardRoute {
			return
		}
		whole := path + "/"
		if strings.ContainsAny(path, "%;\\?# ") || strings.Contains(path, "//") || strings.Contains(whole, "/./") || strings.Contains(whole, "/../") {
			t.Fatalf("%q is forwarded as %q, which another reader may read otherwise", raw, path)
		}
		u, err := url.ParseRequestURI(path)
		if err != nil || u.Path != path {
			t.Fatalf("%q is forwarded as %q, which reads as %v", raw, path, u)
		}
		for segment := range strings.SplitSeq(strings.ToLower(path), "/") {
			if segment == "iam" || strings.HasPrefix(segment, "security-credentials") || strings.HasPrefix(segment, "identity-credentials") {
				t.Fatalf("%q is forwarded as %q", raw, path)
			}
		}
	})
}

func TestRoutes(t *testing.T) {
	for path, want := range map[string]route{
		"/":                             forwardRoute,
		"/latest":                       forwardRoute,
		"/latest/meta-data/instance-id": forwardRoute,
		"/1.0/meta-data/":               forwardRoute,
		"/2021-01-03/dynamic/instance-identity/document":                               forwardRoute,
		"/latest/meta-data/placement/availability-zone/":                               forwardRoute,
		"/latest/meta-data/iam/security-credentials":                                   roleRoute,
		"/latest/meta-data/iam/security-credentials/":                                  roleRoute,
		"/anything/meta-data/iam/security-credentials":                                 roleRoute,
		"/latest/meta-data/iam/security-credentials/a":                                 credentialsRoute,
		"/latest/meta-data/iam/security-credentials/a/":                                credentialsRoute,
		"/latest/meta-data/iam/security-credentials/a/b":                               notFoundRoute,
		"/latest/meta-data/iam/security-credentials-extended":                          notFoundRoute,
		"/latest/meta-data/iam":                                                        iamRoute,
		"/latest/meta-data/iam/":                                                       iamRoute,
		"/latest/meta-data/iam/info":                                                   infoRoute,
		"/latest/meta-data/iam/info/x":                                                 notFoundRoute,
		"/latest/meta-data/IAM/info":                                                   notFoundRoute,
		"/latest/meta-data/iam/other":                                                  notFoundRoute,
		"/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance": notFoundRoute,
		"/latest/meta-data/identity-credentials/ec2/info":                              notFoundRoute,
		"/latest/Meta-Data/Iam/Security-Credentials":                                   notFoundRoute,
		"/latest/api/token":                                                            tokenRoute,
		"/2021-01-03/api/token":                                                        versionedTokenRoute,
		"/healthz":                                                                     notFoundRoute,
		"/metrics":                                                                     notFoundRoute,
		"/debug/store":                                                                 notFoundRoute,
		"/20210103/meta-data":                                                          notFoundRoute,
	} {
		if got, _ := routeOf(path); got != want {
			t.Errorf("routeOf(%q) = %d, want %d", path, got, want)
		}
	}
}
