package imdstap

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPassesOnAndRecords(t *testing.T) {
	var lines []string
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		lines = append(lines, r.Method+" "+r.RequestURI+" "+r.Header.Get("X-Forwarded-For")+r.Header.Get("X-Aws-Ec2-Metadata-Token"))
		if r.URL.Path == "/none" {
			w.WriteHeader(http.StatusNotFound)
		}
		io.WriteString(w, "body of "+r.Host)
	}))
	defer service.Close()
	tap, err := Start(Options{Address: "127.0.0.1:0", Backend: strings.TrimPrefix(service.URL, "http://")})
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	for _, line := range []string{
		"PUT /latest/api/token",
		"GET /latest/meta-data//iam/./security%252Dcredentials/%2e%2e/;a?b=%20",
		"GET /none",
	} {
		conn, err := net.Dial("tcp", tap.Addr())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, line+" HTTP/1.0\r\nHost: 169.254.169.254\r\nUser-Agent: test\r\nX-Aws-Ec2-Metadata-Token: t\r\n\r\n")
		answer, err := io.ReadAll(conn)
		if err != nil || !strings.HasSuffix(string(answer), "body of 169.254.169.254") {
			t.Errorf("%s: %v\n%s", line, err, answer)
		}
		conn.Close()
	}
	passed := []string{
		"PUT /latest/api/token t",
		"GET /latest/meta-data//iam/./security%252Dcredentials/%2e%2e/;a?b=%20 t",
		"GET /none t",
	}
	if diff := cmp.Diff(passed, lines); diff != "" {
		t.Errorf("passed on (-want +got):\n%s", diff)
	}
	me := netip.MustParseAddr("127.0.0.1")
	want := []Request{
		{me, "PUT", "/latest/api/token", "test", 200},
		{me, "GET", "/latest/meta-data//iam/./security%252Dcredentials/%2e%2e/;a?b=%20", "test", 200},
		{me, "GET", "/none", "test", 404},
	}
	if diff := cmp.Diff(want, tap.Requests(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("recorded (-want +got):\n%s", diff)
	}
	if got := tap.CredentialRequests(); len(got) != 1 || got[0].URI != want[1].URI {
		t.Errorf("asked for credentials: %v", got)
	}
	tap.Reset()
	if len(tap.Requests()) != 0 {
		t.Error("requests are still on record")
	}
}

func TestAsksForCredentials(t *testing.T) {
	for uri, want := range map[string]bool{
		"/latest/meta-data/iam/security-credentials":              true,
		"/latest/meta-data/iam/security-credentials/":             true,
		"/2021-07-15/meta-data/IAM/Security-Credentials/node":     true,
		"/latest/meta-data/iam/security-credentials-extended/x":   true,
		"/latest/meta-data/iam/security%2Dcredentials/node":       true,
		"/latest/meta-data/iam%252Fsecurity%252dcredentials%252F": true,
		"/latest/meta-data/iam;x/security-credentials;y":          true,
		"/latest/meta-data/identity-credentials/ec2/info":         true,
		"/latest/meta-data/iam/info":                              false,
		"/latest/meta-data/instance-id":                           false,
		"/latest/api/token":                                       false,
		"/latest/meta-data/iam/security%252Dcredentials/%zz":      true,
		"/%zz": false,
	} {
		if got := (Request{URI: uri}).AsksForCredentials(); got != want {
			t.Errorf("%s: %t, want %t", uri, got, want)
		}
	}
}
