package imds

import (
	"errors"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestEveryRefusalIsCountedAndExplained has a pod refused in each way: the status is counted, and where the status alone does not
// say why, a line of the log does.
func TestEveryRefusalIsCountedAndExplained(t *testing.T) {
	const list, doc, put = "/latest/meta-data/iam/security-credentials/", "/latest/meta-data/iam/security-credentials/reader", "/latest/api/token"
	denied := &fakeCaller{session: "uid", role: "reader", err: &Refusal{Status: http.StatusForbidden, Code: "Refused", Err: errTest}}
	for name, tc := range map[string]struct {
		method, path string
		header       header
		with         func(*Config)
		answer       int
		logged       string
	}{
		"a strange method":   {method: http.MethodDelete, path: list, answer: 405},
		"PUT of a document":  {method: http.MethodPut, path: list, answer: 405},
		"GET of a token":     {method: http.MethodGet, path: put, answer: 405},
		"no TTL":             {method: http.MethodPut, path: put, answer: 400},
		"a malformed path":   {method: http.MethodGet, path: "/latest/../../x", answer: 404},
		"a forwarded PUT":    {method: http.MethodPut, path: put, header: header{tokenTTLHeader: "60", "X-Forwarded-For": "x"}, answer: 403},
		"a dated PUT":        {method: http.MethodPut, path: "/2021-07-15/api/token", answer: 403},
		"a bad token":        {method: http.MethodGet, path: list, header: header{tokenHeader: "x"}, answer: 401, logged: "has ended, or was not made for the pod"},
		"no token":           {method: http.MethodGet, path: list, with: func(c *Config) { c.RequireTokens = true }, answer: 401, logged: "where one is required"},
		"the node's":         {method: http.MethodGet, path: "/latest/meta-data/identity-credentials/ec2", answer: 404},
		"a document that is": {method: http.MethodGet, path: doc, answer: 403, logged: "refused because of the test"},
		"asked too often": {method: http.MethodGet, path: "/latest/meta-data/hostname", answer: 503, logged: "more than 10 times a second",
			with: failsWith(errPodRate)},
		"too much at once": {method: http.MethodGet, path: "/latest/meta-data/hostname", answer: 503, logged: "more than 4 other metadata at a time",
			with: failsWith(errPodExchanges)},
		"no such metadata":  {method: http.MethodGet, path: "/latest/meta-data/hostname", answer: 404, with: failsWith(errNotFound)},
		"a strange service": {method: http.MethodGet, path: "/latest/meta-data/hostname", answer: 500, logged: "the service: status 418", with: failsWith(&Refusal{Status: 500, Err: errors.New("the service: status 418")})},
		"anything else":     {method: http.MethodGet, path: "/latest/meta-data/hostname", answer: 500, logged: "anything", with: failsWith(errors.New("anything"))},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			counted := map[int]int{}
			s := serve(t, denied, func(c *Config) {
				c.Refused = func(status int) {
					mu.Lock()
					defer mu.Unlock()
					counted[status]++
				}
				if tc.with != nil {
					tc.with(c)
				}
			})
			status, body, _ := s.do(t, tc.method, tc.path, tc.header)
			s.Close() // the answer is counted by now
			if d := cmp.Diff(map[int]int{tc.answer: 1}, maps.Clone(counted)); d != "" || status != tc.answer {
				t.Errorf("answered %d; counted (-want +got):\n%s", status, d)
			}
			if tc.path != doc && !strings.HasPrefix(body, "<?xml") {
				t.Errorf("the body is %q, not the service's own", body)
			}
			if got := s.log.String(); !strings.Contains(got, tc.logged) || tc.logged == "" && got != "" {
				t.Errorf("logged %q, want %q", got, tc.logged)
			}
		})
	}
}

func failsWith(err error) func(*Config) {
	return func(c *Config) {
		c.Upstream = forwarder(func(string) (*Response, error) { return nil, err })
	}
}
