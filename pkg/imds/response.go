package imds

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Header values that never change, shared so that an answer allocates none.
var (
	serverValue = []string{"EC2ws"} // some agents recognise EC2 by it
	plainText   = []string{"text/plain"}
	html        = []string{"text/html"}
	noRanges    = []string{"none"}
)

// timeFormat is the format of dates in documents.
const timeFormat = "2006-01-02T15:04:05Z"

// Response is what the node's metadata service has at a path.
type Response struct {
	contentType, lastModified []string // header values; nil if the service sent none
	body                      string
}

// writeText writes a short success. The body has no final newline because several SDKs do not trim
// it.
func writeText(w http.ResponseWriter, body string) {
	writeSuccess(w, plainText, []string{time.Now().UTC().Format(http.TimeFormat)}, body)
}

func writeSuccess(w http.ResponseWriter, contentType, lastModified []string, body string) {
	header := w.Header()
	header["Accept-Ranges"] = noRanges
	header["Last-Modified"] = lastModified
	writeBody(w, http.StatusOK, contentType, body)
}

func serveCredentials(w http.ResponseWriter, r *http.Request, caller Caller, role string) error {
	doc, err := caller.Credentials(r.Context(), role)
	if err != nil {
		return err
	}
	header := w.Header()
	header["Content-Type"] = plainText
	header["Accept-Ranges"] = noRanges
	header["Content-Length"] = doc.ContentLength()
	header["Last-Modified"] = doc.LastModified()
	w.Write(doc.Body())
	return nil
}

// infoDocument returns iam/info for the pod's own role, so that the node's instance profile does
// not leak.
func infoDocument(role, arn string, now time.Time) string {
	// The IAM console creates an instance profile of this name for a role.
	account, _, _ := strings.Cut(arn, ":role/")
	profile := account + ":instance-profile/" + role
	return fmt.Sprintf("{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : %s,\n  \"InstanceProfileArn\" : %s,\n  \"InstanceProfileId\" : %s\n}",
		quote(now.UTC().Format(timeFormat)), quote(profile), quote(profileID(arn)))
}

// profileID returns an ID of the usual form, "AIPA" and 17 letters or digits. It is the same for
// each request with the same role.
func profileID(arn string) string {
	sum := sha256.Sum256([]byte(arn))
	return "AIPA" + base32.StdEncoding.EncodeToString(sum[:])[:17]
}

// writeFailure writes the document for a role that STS refuses, in EC2's format. EC2 sends it with
// status 200. Here the status is 403, because several clients take every 200 for credentials: the
// AWS SDK for JavaScript v2 never calls back, and s3cmd and fog-aws crash.
func writeFailure(w http.ResponseWriter, status int, code, message string) {
	writeBody(w, status, plainText, fmt.Sprintf("{\n  \"Code\" : %s,\n  \"Message\" : %s,\n  \"LastUpdated\" : %s\n}",
		quote(code), quote(message), quote(time.Now().UTC().Format(timeFormat))))
}

// writeError writes an error with the body of the metadata service.
func writeError(w http.ResponseWriter, status int) {
	title := strconv.Itoa(status) + " - " + http.StatusText(status)
	writeBody(w, status, html, `<?xml version="1.0" encoding="iso-8859-1"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
	"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head>
  <title>`+title+`</title>
 </head>
 <body>
  <h1>`+title+`</h1>
 </body>
</html>
`)
}

func writeBody(w http.ResponseWriter, status int, contentType []string, body string) {
	header := w.Header()
	header["Content-Type"] = contentType
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	io.WriteString(w, body)
}

func quote(s string) []byte {
	b, _ := json.Marshal(s) // a string always marshals
	return b
}
