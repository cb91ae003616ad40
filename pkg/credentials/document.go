package credentials

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"
)

// Credentials are the temporary credentials of one session.
type Credentials struct {
	AccessKeyID     string
	SecretAccessKey Secret
	SessionToken    Secret
	// Obtained is when STS was called, by the node's clock.
	Obtained time.Time
	// Expiration is when STS stops accepting them.
	Expiration time.Time
}

// Secret is a string that is printed, logged and marshalled as a placeholder. Only a conversion to
// string returns the value.
type Secret string

const redacted = "[redacted]"

// Format implements fmt.Formatter, so that no verb prints the value.
func (Secret) Format(f fmt.State, _ rune) { f.Write([]byte(redacted)) }

// MarshalText implements encoding.TextMarshaler, which encoding/json and log/slog use.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Document is the metadata service's JSON document with credentials. It is encoded once for all
// requests.
type Document struct {
	body          []byte
	contentLength []string
	lastModified  []string
	expiration    time.Time
}

// Body returns the document. The caller must not change it.
func (d *Document) Body() []byte { return d.body }

// ContentLength returns the header of that name. The caller must not change it.
func (d *Document) ContentLength() []string { return d.contentLength }

// LastModified returns the header of that name: when the credentials were obtained. The caller must
// not change it.
func (d *Document) LastModified() []string { return d.lastModified }

// Expiration returns when the credentials expire.
func (d *Document) Expiration() time.Time { return d.expiration }

// Format implements fmt.Formatter, so that no verb prints the secrets.
func (d *Document) Format(f fmt.State, _ rune) {
	f.Write([]byte("credentials until " + d.expiration.Format(time.RFC3339)))
}

// timeFormat is the only format that every SDK parses: UTC, whole seconds, "Z".
const timeFormat = "2006-01-02T15:04:05Z"

// newDocument encodes one field on each line, in the order of the real service, because scripts
// select lines.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
func newDocument(c *Credentials) *Document {
	body := fmt.Appendf(nil, `{
  "Code" : "Success",
  "LastUpdated" : %q,
  "Type" : "AWS-HMAC",
  "AccessKeyId" : %s,
  "SecretAccessKey" : %s,
  "Token" : %s,
  "Expiration" : %q
}`,
		c.Obtained.UTC().Format(timeFormat),
		quote(c.AccessKeyID), quote(string(c.SecretAccessKey)), quote(string(c.SessionToken)),
		c.Expiration.UTC().Format(timeFormat))
	return documentOf(body, c.Obtained.UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT"), c.Expiration)
}

// documentOf returns the document with this body, and with its headers.
func documentOf(body []byte, lastModified string, expiration time.Time) *Document {
	return &Document{body: body, contentLength: []string{strconv.Itoa(len(body))}, lastModified: []string{lastModified}, expiration: expiration}
}

// quote returns s as a JSON string.
func quote(s string) []byte {
	b, _ := json.Marshal(s) // cannot fail
	return b
}
