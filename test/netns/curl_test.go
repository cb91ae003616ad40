package netns

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// TestCurl compares the bytes of answers, and makes requests that no SDK makes.
func TestCurl(t *testing.T) {
	onThese(t, []setup{bridged}, func(t *testing.T, n *node) {
		n.proxy()
		pod := n.run("pod", "app")
		curl := func(args ...string) string {
			t.Helper()
			out, err := pod.Netns.Run(t.Context(), n.ClientEnv(), "curl", append([]string{"-sS", "--max-time", "5", "-w", "\n%{http_code} %{num_connects}"}, args...)...)
			n.must(err)
			return out
		}
		const service = "http://" + testbed.MetadataAddr
		const list = service + credentials

		for name, args := range map[string][]string{
			"with a slash":             {list},
			"without":                  {strings.TrimSuffix(list, "/")},
			"a dated version":          {service + "/2021-07-15/meta-data/iam/security-credentials/"},
			"HTTP/1.0":                 {"-0", list},
			"Connection: close":        {"-H", "Connection: close", list},
			"empty segments":           {"--path-as-is", service + "//latest//meta-data/iam//security-credentials/"},
			"dot segments":             {"--path-as-is", service + "/latest/./dynamic/../meta-data/iam/security-credentials/"},
			"encoded":                  {"--path-as-is", service + "/latest/meta-data/%69am/security-credentials/"},
			"encoded twice":            {"--path-as-is", service + "/latest/meta-data/%2569am/security-credentials/"},
			"a parameter":              {"--path-as-is", service + "/latest/meta-data;x=1/iam/security-credentials/"},
			"a query":                  {list + "?a=b"},
			"an absolute URI":          {"--request-target", list, list},
			"another Host":             {"-H", "Host: example.com", list},
			"no Host":                  {"-0", "-H", "Host:", list},
			"headers nobody knows":     {"-H", "Range: bytes=0-1", "-H", "If-None-Match: *", "-H", "Accept-Encoding: gzip", list},
			"a body with a GET":        {"-X", "GET", "--data", "x=y", list},
			"X-Forwarded-For on a GET": {"-H", "X-Forwarded-For: 192.0.2.1", list},
		} {
			if got := curl(args...); got != "app\n200 1" {
				t.Errorf("%s: %q, want the role", name, got)
			}
		}

		put := []string{"-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 60"}
		tokens := service + "/latest/api/token"
		for name, args := range map[string][]string{
			"no body":             {tokens},
			"an empty one":        {"-H", "Content-Length: 0", tokens},
			"a form":              {"--data", "", tokens},
			"chunked, 100":        {"-H", "Transfer-Encoding: chunked", "-H", "Expect: 100-continue", "--data", "x", tokens},
			"a path with slashes": {"--path-as-is", service + "//latest/api/./token"},
		} {
			got := curl(append(put, args...)...)
			token, rest, _ := strings.Cut(got, "\n")
			if rest != "200 1" || len(token) < 20 {
				t.Errorf("PUT, %s: %q, want a token", name, got)
				continue
			}
			// Two requests on one connection.
			if got := curl("-H", "X-aws-ec2-metadata-token: "+token, list, list); got != "app\n200 1app\n200 0" {
				t.Errorf("PUT, %s: with the token %q", name, got)
			}
		}
		for name, tc := range map[string]struct {
			args   []string
			status string
		}{
			"no TTL":           {[]string{"-X", "PUT", tokens}, "400"},
			"a TTL of 0":       {[]string{"-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 0", tokens}, "400"},
			"X-Forwarded-For":  {append(put, "-H", "X-Forwarded-For: 192.0.2.1", tokens), "403"},
			"a dated version":  {append(put, service+"/2021-07-15/api/token"), "403"},
			"a bad token":      {[]string{"-H", "X-aws-ec2-metadata-token: x", list}, "401"},
			"an empty token":   {[]string{"-H", "X-aws-ec2-metadata-token;", list}, "401"},
			"POST":             {[]string{"-X", "POST", list}, "405"},
			"OPTIONS":          {[]string{"-X", "OPTIONS", list}, "405"},
			"another role":     {[]string{list + testbed.NodeRole}, "404"},
			"the node's":       {[]string{service + "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance"}, "404"},
			"extended":         {[]string{service + "/latest/meta-data/iam/security-credentials-extended/"}, "404"},
			"above the root":   {[]string{"--path-as-is", service + "/../latest/"}, "404"},
			"a long path":      {[]string{service + "/latest/" + strings.Repeat("a", 2000)}, "404"},
			"too long headers": {[]string{"-H", "X-Long: " + strings.Repeat("a", 20<<10), list}, "431"},
		} {
			got := curl(tc.args...)
			if !strings.HasSuffix(got, "\n"+tc.status+" 1") {
				t.Errorf("%s: %q, want %s", name, got, tc.status)
			}
		}

		head := func(args ...string) []string {
			var names []string
			for line := range strings.Lines(curl(append([]string{"-o", "/dev/null", "-D", "-"}, args...)...)) {
				name, value, ok := strings.Cut(strings.TrimSpace(line), ": ")
				switch name {
				case "Server", "Content-Type", "Accept-Ranges":
					name += ": " + value
				}
				if ok || strings.HasPrefix(name, "HTTP/") {
					names = append(names, name)
				}
			}
			return names
		}
		want := []string{"HTTP/1.1 200 OK", "Accept-Ranges: none", "Content-Length", "Content-Type: text/plain", "Last-Modified", "Server: EC2ws", "Date"}
		for name, args := range map[string][]string{"the list": {list}, "the document": {list + "app"}, "HEAD of the document": {"-I", list + "app"}} {
			if diff := cmp.Diff(want, head(args...)); diff != "" {
				t.Errorf("the head of %s (-want +got):\n%s", name, diff)
			}
		}
		// A script takes the values by their lines.
		document := curl(list + "app")
		var keys []string
		for line := range strings.Lines(document) {
			if key, _, ok := strings.Cut(line, `" : "`); ok {
				keys = append(keys, strings.TrimLeft(key, ` "`))
			}
		}
		if diff := cmp.Diff([]string{"Code", "LastUpdated", "Type", "AccessKeyId", "SecretAccessKey", "Token", "Expiration"}, keys); diff != "" {
			t.Errorf("the document's lines (-want +got):\n%s", diff)
		}
	})
}
