package sts

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	algorithm = "AWS4-HMAC-SHA256"
	amzTime   = "20060102T150405Z"
	// skew is the allowed difference between the signature's time and the server's. STS's own
	// message names it ("… is now earlier than … (… - 15 min.)", aws/aws-cli#6676).
	skew = 15 * time.Minute
)

// authorization is a parsed Authorization header of Signature Version 4.
type authorization struct {
	accessKeyID           string
	date, region, service string
	signedHeaders         []string
	signature             string
}

// authenticate returns the principal that signed the request (IAM User Guide, "Create a signed AWS
// API request"), and the region of the credential scope.
func (s *Server) authenticate(r *http.Request, body []byte) (caller Principal, region string, err *apiError) {
	header := r.Header.Get("Authorization")
	if header == "" {
		return caller, "", refuse(http.StatusForbidden, "MissingAuthenticationToken", "Request is missing Authentication Token")
	}
	auth, err := parseAuthorization(header)
	if err != nil {
		return caller, "", err
	}
	signed, err := s.signingTime(r, auth)
	if err != nil {
		return caller, "", err
	}
	s.mu.Lock()
	caller, known := s.principals[auth.accessKeyID]
	s.mu.Unlock()
	if !known {
		return caller, "", invalidToken()
	}
	if err := checkSignedHeaders(r, auth); err != nil {
		return caller, "", err
	}
	want := signature(caller.SecretAccessKey, auth, signed, canonicalRequest(r, body, auth.signedHeaders))
	if subtle.ConstantTimeCompare([]byte(want), []byte(auth.signature)) != 1 {
		return caller, "", mismatch("The request signature we calculated does not match the signature you provided. " +
			"Check your AWS Secret Access Key and signing method. Consult the service documentation for details.")
	}
	if subtle.ConstantTimeCompare([]byte(r.Header.Get("X-Amz-Security-Token")), []byte(caller.SessionToken)) != 1 {
		return caller, "", invalidToken()
	}
	if !caller.Expires.IsZero() && !s.now().Before(caller.Expires) {
		return caller, "", expiredToken()
	}
	return caller, auth.region, nil
}

func mismatch(message string) *apiError {
	return refuse(http.StatusForbidden, "SignatureDoesNotMatch", "%s", message)
}

func invalidToken() *apiError {
	return refuse(http.StatusForbidden, "InvalidClientTokenId", "The security token included in the request is invalid.")
}

func expiredToken() *apiError {
	return refuse(http.StatusForbidden, "ExpiredToken", "The security token included in the request is expired")
}

func parseAuthorization(header string) (authorization, *apiError) {
	var auth authorization
	incomplete := func(what string) (authorization, *apiError) {
		return auth, refuse(http.StatusBadRequest, "IncompleteSignature", "Authorization header requires %s. Authorization=%s", what, header)
	}
	rest, ok := strings.CutPrefix(header, algorithm+" ")
	if !ok {
		return incomplete("the algorithm " + algorithm)
	}
	parts := map[string]string{}
	for _, part := range strings.Split(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		parts[name] = value
	}
	for _, name := range []string{"Credential", "SignedHeaders", "Signature"} {
		if parts[name] == "" {
			return incomplete("'" + name + "' parameter")
		}
	}
	scope := strings.Split(parts["Credential"], "/")
	if len(scope) != 5 {
		return incomplete("a 'Credential' of five parts")
	}
	auth = authorization{
		accessKeyID: scope[0], date: scope[1], region: scope[2], service: scope[3],
		signedHeaders: strings.Split(parts["SignedHeaders"], ";"),
		signature:     parts["Signature"],
	}
	switch {
	case auth.service != "sts":
		return auth, mismatch("Credential should be scoped to correct service: 'sts'.")
	case scope[4] != "aws4_request":
		return auth, mismatch("Credential should be scoped with a valid terminator: 'aws4_request', not '" + scope[4] + "'.")
	case auth.region == "":
		return auth, mismatch("Credential should be scoped to a valid region.")
	}
	return auth, nil
}

// signingTime returns the request's X-Amz-Date. It must be near the server's time and on the day of
// the credential scope.
func (s *Server) signingTime(r *http.Request, auth authorization) (string, *apiError) {
	stamp := r.Header.Get("X-Amz-Date")
	signed, err := time.Parse(amzTime, stamp)
	if err != nil {
		return "", refuse(http.StatusBadRequest, "IncompleteSignature", "Date must be in ISO-8601 'basic format'. Got '%s'.", stamp)
	}
	if stamp[:8] != auth.date {
		return "", mismatch("Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: '" + auth.date + "' != '" + stamp[:8] + "'.")
	}
	now := s.now().UTC()
	if earliest := now.Add(-skew); signed.Before(earliest) {
		return "", mismatch("Signature expired: " + stamp + " is now earlier than " + earliest.Format(amzTime) + " (" + now.Format(amzTime) + " - 15 min.)")
	}
	if latest := now.Add(skew); signed.After(latest) {
		return "", mismatch("Signature not yet current: " + stamp + " is still later than " + latest.Format(amzTime) + " (" + now.Format(amzTime) + " + 15 min.)")
	}
	return stamp, nil
}

// checkSignedHeaders checks that the signature covers the host and every x-amz-* header.
func checkSignedHeaders(r *http.Request, auth authorization) *apiError {
	if !slices.IsSorted(auth.signedHeaders) {
		return mismatch("SignedHeaders are not in alphabetical order.")
	}
	if !slices.Contains(auth.signedHeaders, "host") {
		return mismatch("'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization.")
	}
	for name := range r.Header {
		if name = strings.ToLower(name); strings.HasPrefix(name, "x-amz-") && !slices.Contains(auth.signedHeaders, name) {
			return mismatch("'" + name + "' must be a 'SignedHeader' in the AWS Authorization.")
		}
	}
	return nil
}

func canonicalRequest(r *http.Request, body []byte, signedHeaders []string) string {
	var b strings.Builder
	// Requests for other paths are refused before.
	b.WriteString(r.Method + "\n/\n" + canonicalQuery(r.URL) + "\n")
	for _, name := range signedHeaders {
		b.WriteString(name + ":" + headerValue(r, name) + "\n")
	}
	payload := sha256.Sum256(body)
	b.WriteString("\n" + strings.Join(signedHeaders, ";") + "\n" + hex.EncodeToString(payload[:]))
	return b.String()
}

func canonicalQuery(u *url.URL) string {
	var pairs []string
	for name, values := range u.Query() {
		for _, value := range values {
			pairs = append(pairs, uriEncode(name)+"="+uriEncode(value))
		}
	}
	slices.Sort(pairs)
	return strings.Join(pairs, "&")
}

// headerValue returns a header's values, each trimmed and with single spaces. Some headers net/http
// moves from the header map to fields.
func headerValue(r *http.Request, name string) string {
	values := r.Header.Values(name)
	switch name {
	case "host":
		values = []string{r.Host}
	case "content-length":
		values = []string{strconv.FormatInt(r.ContentLength, 10)}
	}
	var trimmed []string
	for _, v := range values {
		trimmed = append(trimmed, strings.Join(strings.Fields(v), " "))
	}
	return strings.Join(trimmed, ",")
}

// uriEncode encodes all but RFC 3986's unreserved characters. A space becomes %20.
func uriEncode(s string) string {
	return strings.ReplaceAll(url.QueryEscape(s), "+", "%20")
}

func signature(secret string, auth authorization, signed, canonical string) string {
	hash := sha256.Sum256([]byte(canonical))
	scope := strings.Join([]string{auth.date, auth.region, auth.service, "aws4_request"}, "/")
	toSign := strings.Join([]string{algorithm, signed, scope, hex.EncodeToString(hash[:])}, "\n")
	key := []byte("AWS4" + secret)
	for _, part := range []string{auth.date, auth.region, auth.service, "aws4_request", toSign} {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	return hex.EncodeToString(key)
}
