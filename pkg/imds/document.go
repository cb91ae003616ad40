package imds

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// timeFormat is how the metadata service writes dates.
const timeFormat = "2006-01-02T15:04:05Z"

// failureDocument returns the body of the answer for a role that STS refuses, in the form of EC2's own. EC2 sends it with status 200;
// here it comes with 403, because several clients take every 200 for credentials: the AWS SDK for JavaScript v2 never calls back,
// and s3cmd and fog-aws crash.
func failureDocument(code, message string, now time.Time) string {
	return fmt.Sprintf("{\n  \"Code\" : %s,\n  \"Message\" : %s,\n  \"LastUpdated\" : %s\n}",
		quote(code), quote(message), quote(now.UTC().Format(timeFormat)))
}

func quote(s string) []byte {
	b, _ := json.Marshal(s) // a string always marshals
	return b
}

// serveInfo answers iam/info for the pod's own role, so that the node's instance profile does not show.
func (h *Handler) serveInfo(w http.ResponseWriter, r *http.Request, source netip.Addr, caller Caller) {
	name, arn, err := caller.Role(r.Context())
	if err != nil {
		h.refuse(w, r, source, caller, err)
		return
	}
	// A role is no instance profile; this is the one that the console makes for a role of that name.
	account, _, _ := strings.Cut(arn, ":role/")
	profile := account + ":instance-profile/" + name
	answer(w, fmt.Sprintf("{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : %s,\n  \"InstanceProfileArn\" : %s,\n  \"InstanceProfileId\" : %s\n}",
		quote(time.Now().UTC().Format(timeFormat)), quote(profile), quote(profileID(arn))))
}

// profileID is an ID of the right shape, "AIPA" and 17 letters or digits, that is the same for a role each time.
func profileID(arn string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
	h := fnv.New128a()
	h.Write([]byte(arn))
	id := []byte("AIPA")
	for _, b := range append(h.Sum(nil), 0) {
		id = append(id, alphabet[b%32])
	}
	return string(id)
}

// fail is an error with the body that the metadata service gives it.
func fail(w http.ResponseWriter, status int) {
	title := strconv.Itoa(status) + " - " + http.StatusText(status)
	body := `<?xml version="1.0" encoding="iso-8859-1"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
	"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head>
  <title>` + title + `</title>
 </head>
 <body>
  <h1>` + title + `</h1>
 </body>
</html>
`
	header := w.Header()
	header["Content-Type"] = html
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	w.Write([]byte(body))
}
