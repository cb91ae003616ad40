package imds

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Each numbered statement of the protocol has a test that carries its number. Those that are not here are in handler_test.go,
// path_test.go and upstream_test.go, and in pkg/credentials, where the documents and their time are.

// raw sends what a client sends, byte for byte, and reads one answer to each method.
func (s *service) raw(t *testing.T, request string, methods ...string) []*http.Response {
	t.Helper()
	c, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	var answers []*http.Response
	in := bufio.NewReader(c)
	for _, method := range methods {
		res, err := http.ReadResponse(in, &http.Request{Method: method})
		if err != nil {
			t.Fatalf("%q: %v", request, err)
		}
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatalf("%q: %v", request, err)
		}
		res.Body = io.NopCloser(strings.NewReader(string(body)))
		answers = append(answers, res)
	}
	return answers
}

func bodyOf(res *http.Response) string {
	body, _ := io.ReadAll(res.Body)
	return string(body)
}

func TestIMDS01AnyHostIsServed(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader"})
	for _, host := range []string{"169.254.169.254", "169.254.169.254:80", "[fd00:ec2::254]", "fd00:ec2::254", "instance-data", "evil.example"} {
		res := s.raw(t, "GET "+list+" HTTP/1.1\r\nHost: "+host+"\r\n\r\n", "GET")[0]
		if body := bodyOf(res); res.StatusCode != 200 || body != "reader" {
			t.Errorf("Host %s: %d %q", host, res.StatusCode, body)
		}
	}
}

func TestIMDS03NothingIsRedirected(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader", doc: document(t)})
	for _, path := range []string{
		"/latest/meta-data/iam/security-credentials", "/latest/meta-data/iam/security-credentials//", "//latest/meta-data", "/latest", "/latest/",
		"/latest/meta-data/../meta-data/iam/", "/latest/meta-data/iam/security-credentials/reader/", "/", "/nothing", "/latest/api/token/",
	} {
		for _, method := range []string{"GET", "HEAD", "PUT", "POST"} {
			if status, _, _ := s.do(t, method, path, nil); status >= 300 && status < 400 {
				t.Errorf("%s %s: %d", method, path, status)
			}
		}
	}
}

func TestIMDS04SuccessesHaveTheServicesHeaders(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader", session: "uid", doc: document(t)})
	for _, r := range [][2]string{{"GET", list}, {"GET", doc}, {"HEAD", doc}, {"GET", "/latest/meta-data/iam/info"}, {"GET", "/latest/meta-data/iam/"}, {"PUT", "/latest/api/token"}} {
		status, body, h := s.do(t, r[0], r[1], header{tokenTTLHeader: "60"})
		if status != 200 || h.Get("Server") != "EC2ws" || h.Get("Content-Type") != "text/plain" || h.Get("Accept-Ranges") != "none" {
			t.Errorf("%v: %d %v", r, status, h)
		}
		if r[0] != "HEAD" && h.Get("Content-Length") != fmt.Sprint(len(body)) {
			t.Errorf("%v: Content-Length %s of %d", r, h.Get("Content-Length"), len(body))
		}
		if _, err := time.Parse(http.TimeFormat, h.Get("Last-Modified")); err != nil {
			t.Errorf("%v: %v", r, err)
		}
	}
}

func TestIMDS06OldAndPlainHTTP(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader"})
	for name, request := range map[string]string{
		"HTTP/1.0":             "GET " + list + " HTTP/1.0\r\n\r\n",
		"closed by the client": "GET " + list + " HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
		"unknown headers":      "GET " + list + " HTTP/1.1\r\nHost: a\r\nX-Whatever: 1\r\nAuthorization: AWS4-HMAC-SHA256 x\r\n\r\n",
		"compression offered":  "GET " + list + " HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip, br\r\n\r\n",
	} {
		res := s.raw(t, request, "GET")[0]
		if body := bodyOf(res); res.StatusCode != 200 || body != "reader" || res.Header.Get("Content-Encoding") != "" {
			t.Errorf("%s: %d %q %v", name, res.StatusCode, body, res.Header)
		}
	}
	twice := "GET " + list + " HTTP/1.1\r\nHost: a\r\n\r\n"
	for _, res := range s.raw(t, twice+twice, "GET", "GET") {
		if body := bodyOf(res); body != "reader" {
			t.Errorf("kept alive: %q", body)
		}
	}
}

func TestIMDS10TokenRequestsWithWhateverBody(t *testing.T) {
	s := serve(t, &fakeCaller{session: "uid", role: "reader"})
	const head = "PUT /latest/api/token HTTP/1.1\r\nHost: a\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n"
	const next = "GET " + list + " HTTP/1.1\r\nHost: a\r\n\r\n"
	for name, request := range map[string]string{
		"no Content-Length": head + "\r\n",
		"0":                 head + "Content-Length: 0\r\n\r\n",
		"a form":            head + "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 3\r\n\r\na=b",
		"chunks":            head + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
	} {
		answers := s.raw(t, request+next, "PUT", "GET")
		if token, role := bodyOf(answers[0]), bodyOf(answers[1]); answers[0].StatusCode != 200 || token == "" || role != "reader" {
			t.Errorf("%s: %d %q, and then %q", name, answers[0].StatusCode, token, role)
		}
	}
	// s3fs waits for 100 Continue before it sends its body.
	answers := s.raw(t, head+"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "PUT", "PUT")
	if answers[0].StatusCode != http.StatusContinue || answers[1].StatusCode != 200 {
		t.Errorf("Expect: %d, %d", answers[0].StatusCode, answers[1].StatusCode)
	}
}

func TestIMDS12TokensSurviveARestart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "session.key")
	now := time.Now()
	token := ""
	for restart := range 3 {
		key, err := LoadKey(file)
		if err != nil {
			t.Fatal(err)
		}
		sessions := NewSessions(key)
		if token == "" {
			token = sessions.Token("uid", now.Add(maxTTL*time.Second))
		}
		for _, age := range []time.Duration{0, (maxTTL - 1) * time.Second} {
			if !sessions.valid(new(verifiedToken), token, "uid", now.Add(age)) {
				t.Errorf("restart %d: not valid after %s", restart, age)
			}
		}
		if sessions.valid(new(verifiedToken), token, "uid", now.Add(maxTTL*time.Second)) || sessions.valid(new(verifiedToken), token, "another", now) {
			t.Errorf("restart %d: valid after its end, or for another pod", restart)
		}
	}
}

func TestIMDS14TokensAreRequiredOnlyIfSaid(t *testing.T) {
	for _, required := range []bool{false, true} {
		s := serve(t, &fakeCaller{session: "uid", role: "reader", doc: document(t)}, func(c *Config) { c.RequireTokens = required })
		want := 200
		if required {
			want = 401
		}
		token := s.token(t)
		for _, path := range []string{list, doc, "/latest/meta-data/iam/info", "/latest/meta-data/instance-id", "/"} {
			if status, _, _ := s.do(t, http.MethodGet, path, nil); status != want {
				t.Errorf("required %v, %s without a token: %d", required, path, status)
			}
			if status, _, _ := s.do(t, http.MethodGet, path, header{tokenHeader: token}); status != 200 {
				t.Errorf("required %v, %s with a token: %d", required, path, status)
			}
		}
		if said := strings.Contains(s.log.String(), "where one is required"); said != required {
			t.Errorf("required %v: logged %s", required, s.log)
		}
	}
}

func TestIMDS16NoRoleIs404AndNeverEmpty(t *testing.T) {
	s := serve(t, &fakeCaller{err: &Refusal{Status: 404, Err: errTest}})
	for _, path := range []string{list, strings.TrimSuffix(list, "/"), doc} {
		if status, body, _ := s.do(t, http.MethodGet, path, nil); status != 404 || body == "" {
			t.Errorf("%s: %d %q", path, status, body)
		}
	}
}

func TestIMDS18CodeAndDates(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader", doc: document(t)})
	_, body, _ := s.do(t, http.MethodGet, doc, nil)
	date := `"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"`
	for _, want := range []string{`"Code" : "Success"`, `"LastUpdated" : ` + date, `"Expiration" : ` + date} {
		if !regexp.MustCompile(want).MatchString(body) {
			t.Errorf("no %s in %s", want, body)
		}
	}
}

func TestIMDS20ExtendedCredentialsAreNotFoundAndNeverForwarded(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader", doc: document(t)})
	for _, path := range []string{"/latest/meta-data/iam/security-credentials-extended", "/latest/meta-data/iam/security-credentials-extended/",
		"/latest/meta-data/iam/security-credentials-extended/reader", "/latest/meta-data/iam/Security-Credentials-Extended/reader"} {
		if status, _, _ := s.do(t, http.MethodGet, path, nil); status != 404 {
			t.Errorf("%s: %d", path, status)
		}
	}
	if len(s.upstream) > 0 {
		t.Errorf("forwarded %v", s.upstream)
	}
}

// TestDeniedPaths holds that what an operator denies is not found, in whichever spelling, and the rest is.
func TestDeniedPaths(t *testing.T) {
	refused := 0
	s := serve(t, &fakeCaller{}, func(c *Config) {
		c.Deny = []*regexp.Regexp{regexp.MustCompile(`^/[^/]+/user-data`), regexp.MustCompile(`/tags/instance/secret$`)}
		c.Refused = func(status int) {
			if status == 404 {
				refused++
			}
		}
	})
	denied := []string{"/latest/user-data", "/latest/user-data/", "/2021-07-15/user-data", "/latest//user-data", "/latest/%75ser-data", "/latest/./user-data",
		"/latest/meta-data/tags/instance/secret", "/latest/meta-data/tags/instance/secret/"}
	for _, path := range denied {
		if status, _, _ := s.do(t, http.MethodGet, path, nil); status != 404 {
			t.Errorf("%s: %d", path, status)
		}
	}
	if lines := strings.Count(s.log.String(), "is denied to pods"); refused != len(denied) || lines == 0 || lines > refusalBurst {
		t.Errorf("counted %d, logged %s", refused, s.log)
	}
	if len(s.upstream) > 0 {
		t.Errorf("forwarded %v", s.upstream)
	}
	for _, path := range []string{"/latest/meta-data/tags/instance/secrets", "/latest/meta-data/instance-id", "/latest/meta-data/user-data"} {
		if status, _, _ := s.do(t, http.MethodGet, path, nil); status != 200 {
			t.Errorf("%s: %d", path, status)
		}
	}
}
