package sts

import (
	"bytes"
	"encoding/xml"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go/aws/credentials"
	v4 "github.com/aws/aws-sdk-go/aws/signer/v4"
)

// sign makes a request of the Query API with the SDK's signer.
func sign(t *testing.T, s *Server, p Principal, method, params string, at time.Time) *http.Request {
	t.Helper()
	target, body := s.URL()+"/", params
	if method == http.MethodGet {
		target, body = target+"?"+params, ""
	}
	req, err := http.NewRequestWithContext(t.Context(), method, target, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	}
	signer := v4.NewSigner(credentials.NewStaticCredentials(p.AccessKeyID, p.SecretAccessKey, p.SessionToken))
	if _, err := signer.Sign(req, strings.NewReader(body), "sts", "us-east-1", at); err != nil {
		t.Fatal(err)
	}
	return req
}

// send tells the answer's status, and the error's code and message where it is one.
func send(t *testing.T, req *http.Request) (status int, code, message string) {
	t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.StatusCode, "", ""
	}
	var e errorResponse
	if err := xml.Unmarshal(body, &e); err != nil {
		t.Fatalf("%d with a body that is no error: %v\n%s", resp.StatusCode, err, body)
	}
	return resp.StatusCode, e.Error.Code, e.Error.Message
}

// TestSignature changes one thing at a time in a request that is right otherwise.
func TestSignature(t *testing.T) {
	s, _ := start(t)
	const identity = "Action=GetCallerIdentity&Version=2011-06-15"
	post := func(p Principal, at time.Time) *http.Request { return sign(t, s, p, http.MethodPost, identity, at) }
	change := func(set func(*Principal)) Principal { p := node; set(&p); return p }
	resign := func(old, new string) func(*http.Request) {
		return func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), old, new, 1))
		}
	}
	now := time.Now()
	for _, test := range []struct {
		name   string
		req    *http.Request
		tamper func(*http.Request)
		status int
		code   string
	}{
		{name: "untouched", req: post(node, now), status: 200},
		{name: "untouched GET", req: sign(t, s, node, http.MethodGet, "Version=2011-06-15&Action=GetCallerIdentity", now), status: 200},
		{name: "GET with parameters to encode", req: sign(t, s, node, http.MethodGet, "Version=2011-06-15&Action=AssumeRole&RoleSessionName=a%3D%2B%20b&RoleArn="+url.QueryEscape(appRole), now),
			status: 400, code: "ValidationError"},
		{name: "wrong secret", req: post(change(func(p *Principal) { p.SecretAccessKey += "x" }), now), status: 403, code: "SignatureDoesNotMatch"},
		{name: "unknown key", req: post(change(func(p *Principal) { p.AccessKeyID = "AKIAUNKNOWN" }), now), status: 403, code: "InvalidClientTokenId"},
		{name: "another token", req: post(change(func(p *Principal) { p.SessionToken = "other" }), now), status: 403, code: "InvalidClientTokenId"},
		{name: "no token", req: post(change(func(p *Principal) { p.SessionToken = "" }), now), status: 403, code: "InvalidClientTokenId"},
		{name: "a clock 14 minutes slow", req: post(node, now.Add(-14*time.Minute)), status: 200},
		{name: "a clock 16 minutes slow", req: post(node, now.Add(-16*time.Minute)), status: 403, code: "SignatureDoesNotMatch"},
		{name: "a clock 16 minutes fast", req: post(node, now.Add(16*time.Minute)), status: 403, code: "SignatureDoesNotMatch"},
		{name: "body changed", req: post(node, now), status: 403, code: "SignatureDoesNotMatch", tamper: func(r *http.Request) {
			r.Body = io.NopCloser(bytes.NewReader([]byte(strings.Replace(identity, "Version", "version", 1))))
		}},
		{name: "query added", req: post(node, now), status: 403, code: "SignatureDoesNotMatch", tamper: func(r *http.Request) { r.URL.RawQuery = "a=b" }},
		{name: "host changed", req: post(node, now), status: 403, code: "SignatureDoesNotMatch", tamper: func(r *http.Request) { r.Host = "sts.amazonaws.com" }},
		{name: "unsigned x-amz header", req: post(node, now), status: 403, code: "SignatureDoesNotMatch", tamper: func(r *http.Request) { r.Header.Set("X-Amz-Extra", "1") }},
		{name: "unsigned other header", req: post(node, now), status: 200, tamper: func(r *http.Request) { r.Header.Set("X-Trace", "1") }},
		{name: "host not signed", req: post(node, now), status: 403, code: "SignatureDoesNotMatch", tamper: resign(";host;", ";")},
		{name: "another service", req: post(node, now), status: 403, code: "SignatureDoesNotMatch", tamper: resign("/sts/", "/s3/")},
		{name: "another region", req: post(node, now), status: 403, code: "SignatureDoesNotMatch", tamper: resign("/us-east-1/", "/us-east-2/")},
		{name: "not signed", req: post(node, now), status: 403, code: "MissingAuthenticationToken", tamper: func(r *http.Request) { r.Header.Del("Authorization") }},
		{name: "no signature", req: post(node, now), status: 400, code: "IncompleteSignature", tamper: resign("Signature=", "signature=")},
		{name: "version 2", req: post(node, now), status: 400, code: "IncompleteSignature", tamper: resign("AWS4-HMAC-SHA256 ", "AWS ")},
		{name: "no date", req: post(node, now), status: 400, code: "IncompleteSignature", tamper: func(r *http.Request) { r.Header.Del("X-Amz-Date") }},
		{name: "unknown action", req: sign(t, s, node, http.MethodPost, "Action=Dance&Version=2011-06-15", now), status: 400, code: "InvalidAction"},
		{name: "unknown version", req: sign(t, s, node, http.MethodPost, "Action=GetCallerIdentity&Version=2010-01-01", now), status: 400, code: "InvalidAction"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.tamper != nil {
				test.tamper(test.req)
			}
			if status, code, message := send(t, test.req); status != test.status || code != test.code {
				t.Errorf("%d %s: %s, want %d %s", status, code, message, test.status, test.code)
			}
		})
	}
}
