package imds

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// instance is what a real instance lists and answers, below each version. Its values are what a filter could take for names.
var instance = map[string]string{
	"":                                        "dynamic\nmeta-data\nuser-data",
	"user-data":                               "#!/bin/sh\niam/\nidentity-credentials/",
	"dynamic/":                                "instance-identity/",
	"dynamic/instance-identity/":              "document\npkcs7",
	"dynamic/instance-identity/document":      "{\n  \"region\" : \"eu-west-1\"\n}",
	"dynamic/instance-identity/pkcs7":         "MIAG\niam/x",
	"meta-data/":                              "ami-id\nhostname\niam/\nidentity-credentials/\nplacement/\npublic-keys/\ntags/",
	"meta-data/ami-id":                        "ami-1",
	"meta-data/hostname":                      "iam",
	"meta-data/iam/":                          "info\nsecurity-credentials/",
	"meta-data/identity-credentials/":         "ec2/",
	"meta-data/placement/":                    "availability-zone\nregion",
	"meta-data/placement/availability-zone":   "eu-west-1b",
	"meta-data/placement/region":              "eu-west-1",
	"meta-data/public-keys/":                  "0=iam\n1=a key",
	"meta-data/public-keys/0/":                "openssh-key",
	"meta-data/public-keys/0/openssh-key":     "ssh-rsa AAAA/iam/x= a key",
	"meta-data/public-keys/1/":                "openssh-key",
	"meta-data/public-keys/1/openssh-key":     "ssh-rsa BBBB= another",
	"meta-data/tags/":                         "instance/",
	"meta-data/tags/instance/":                "Name\nteam:iam\niam",
	"meta-data/tags/instance/Name":            "identity-credentials",
	"meta-data/tags/instance/team:iam":        "iam",
	"meta-data/tags/instance/iam":             "x",
	"meta-data/identity-credentials/ec2/":     "info\nsecurity-credentials/",
	"meta-data/identity-credentials/ec2/info": "{}",
	"meta-data/iam/security-credentials/":     "node",
	"meta-data/iam/info":                      "{}",
	"meta-data/iam/security-credentials/node": "secret",
}

// serveInstance is the service of that instance, which has directories without the slash at their end as well.
func serveInstance(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/" {
		io.WriteString(w, "1.0\n2021-07-15\nlatest")
		return
	}
	version, rest, _ := strings.Cut(r.URL.Path[1:], "/")
	value, ok := instance[rest]
	if !ok {
		value, ok = instance[rest+"/"]
	}
	if !ok || !slices.Contains([]string{"1.0", "2021-07-15", "latest"}, version) {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	w.Header().Set("Etag", "whole")
	io.WriteString(w, value)
}

// crawl asks for a path, and for all that is listed below it, as cloud-init and tools like it do. It returns the paths, and those that
// were not answered with 200.
func crawl(t *testing.T, s *service, path string, h header) (all, failed []string) {
	t.Helper()
	all = append(all, path)
	status, body, _ := s.do(t, http.MethodGet, path, h)
	if status != http.StatusOK {
		return all, []string{fmt.Sprint(path, ": ", status)}
	}
	depth := strings.Count(path, "/")
	if path != "/" && depth > 2 && !strings.HasSuffix(path, "/") || strings.HasSuffix(path, "/user-data") {
		return all, nil
	}
	for name := range strings.SplitSeq(strings.TrimSpace(body), "\n") {
		if index, _, ok := strings.Cut(name, "="); ok {
			name = index + "/"
		}
		if name == "" {
			continue
		}
		more, missing := crawl(t, s, strings.TrimSuffix(path, "/")+"/"+name, h)
		all, failed = append(all, more...), append(failed, missing...)
	}
	return all, failed
}

// TestEverythingListedIsAnswered crawls the service as a pod with a role and as one without, by both versions of the protocol.
func TestEverythingListedIsAnswered(t *testing.T) {
	latest := func(all []string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(p string) bool { return !strings.HasPrefix(p, "/latest") })
	}
	withIAM := []string{"/latest/meta-data/iam/", "/latest/meta-data/iam/info", "/latest/meta-data/iam/security-credentials/", "/latest/meta-data/iam/security-credentials/own"}
	for name, tt := range map[string]struct {
		deny []string
		lost []string // beyond what no pod sees
	}{
		"nothing denied": {},
		"user data":      {[]string{"^/[^/]+/user-data"}, []string{"/latest/user-data"}},
		"some": {[]string{"/placement/region$", "/public-keys/1", "/dynamic/"}, []string{"/latest/dynamic/instance-identity/",
			"/latest/dynamic/instance-identity/document", "/latest/dynamic/instance-identity/pkcs7", "/latest/meta-data/placement/region",
			"/latest/meta-data/public-keys/1/", "/latest/meta-data/public-keys/1/openssh-key"}},
		"a directory by its slash": {[]string{"/tags/$"}, []string{"/latest/meta-data/tags/", "/latest/meta-data/tags/instance/", "/latest/meta-data/tags/instance/Name", "/latest/meta-data/tags/instance/team:iam"}},
		"an old version":           {[]string{"^/1.0"}, nil},
	} {
		for _, role := range []string{"own", ""} {
			for _, v2 := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s, role %q, version 2: %v", name, role, v2), func(t *testing.T) {
					_, upstream := newNode(t, serveInstance)
					upstream.limit.pods, upstream.limit.node = ratelimit.NewKeyed[netip.Addr](rate.Inf, 0), rate.NewLimiter(rate.Inf, 0)
					b := &fakeCaller{session: "uid", role: role}
					if role == "" {
						b.err = &Refusal{Status: http.StatusNotFound, Err: errTest}
					} else {
						b.doc = document(t)
					}
					s := serve(t, b, func(c *Config) {
						c.Upstream, c.RequireTokens = upstream, v2
						for _, d := range tt.deny {
							c.Deny = append(c.Deny, regexp.MustCompile(d))
						}
					})
					var h header
					if v2 {
						_, token, _ := s.do(t, http.MethodPut, "/latest/api/token", header{"X-aws-ec2-metadata-token-ttl-seconds": "60"})
						h = header{"X-aws-ec2-metadata-token": token}
					}
					all, failed := crawl(t, s, "/", h)
					if len(failed) > 0 {
						t.Errorf("listed, and not answered: %v", failed)
					}
					var want []string
					for path, value := range instance {
						path = "/latest/" + path
						if slices.Contains([]string{"/latest/", "/latest/dynamic/", "/latest/meta-data/"}, path) {
							path = strings.TrimSuffix(path, "/") // as it is listed
						}
						if to, _ := routeOf(path); to == forwardRoute && value != "" && !slices.Contains(tt.lost, path) {
							want = append(want, path)
						}
					}
					if role != "" {
						want = append(want, withIAM...)
					}
					slices.Sort(want)
					got := latest(all)
					slices.Sort(got)
					if d := cmp.Diff(want, got); d != "" {
						t.Errorf("what the pod sees (-want +got):\n%s", d)
					}
				})
			}
		}
	}
}

// TestListingIsTheSameWithoutItsSlash holds that spelling, version and method of a request make no other listing of it, and that values stay as
// they are.
func TestListingIsTheSameWithoutItsSlash(t *testing.T) {
	_, upstream := newNode(t, serveInstance)
	upstream.limit.pods = ratelimit.NewKeyed[netip.Addr](rate.Inf, 0)
	s := serve(t, &fakeCaller{err: &Refusal{Status: http.StatusNotFound, Err: errTest}}, func(c *Config) {
		c.Upstream, c.Deny = upstream, []*regexp.Regexp{regexp.MustCompile("/placement/region")}
	})
	for path, want := range map[string]string{
		"/latest/meta-data":                             "ami-id\nhostname\nplacement/\npublic-keys/\ntags/",
		"/2021-07-15/meta-data/":                        "ami-id\nhostname\nplacement/\npublic-keys/\ntags/",
		"/latest/./meta-data//":                         "ami-id\nhostname\nplacement/\npublic-keys/\ntags/",
		"/latest/meta-data/placement":                   "availability-zone",
		"/latest/meta-data/tags/instance":               "Name\nteam:iam",
		"/latest/meta-data/public-keys":                 instance["meta-data/public-keys/"],
		"/latest/meta-data/hostname":                    "iam",
		"/latest/meta-data/tags/instance/Name":          "identity-credentials",
		"/latest/meta-data/tags/instance/Name/":         "",
		"/latest/user-data":                             instance["user-data"],
		"/latest/user-data/":                            "",
		"/latest/dynamic/instance-identity/document":    instance["dynamic/instance-identity/document"],
		"/latest/meta-data/placement/availability-zone": "eu-west-1b",
	} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			status, body, h := s.do(t, method, path, nil)
			if want == "" { // this service does not have it
				if status != http.StatusNotFound {
					t.Errorf("%s %s: %d", method, path, status)
				}
				continue
			}
			if length := h.Get("Content-Length"); status != http.StatusOK || length != fmt.Sprint(len(want)) || method == http.MethodGet && body != want {
				t.Errorf("%s %s: %d %q, %s bytes; want %q", method, path, status, body, length, want)
			}
			if listing := strings.Contains(want, "\n") && strings.Contains(path, "meta-data"); listing && h.Get("Etag") != "" {
				t.Errorf("%s %s: the Etag of another listing", method, path)
			}
		}
	}
}
