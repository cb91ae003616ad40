package credentials

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var discard = slog.New(slog.DiscardHandler)

func TestIMDS17DocumentIsOneFieldALineInOrder(t *testing.T) {
	at := time.Date(2026, 11, 23, 12, 0, 0, 999, time.FixedZone("x", 3600))
	d := newDocument(&Credentials{AccessKeyID: "ASIAX", SecretAccessKey: "se/cr+et", SessionToken: "to=ken", Obtained: at, Expiration: at.Add(time.Hour)})
	want := `{
  "Code" : "Success",
  "LastUpdated" : "2026-11-23T11:00:00Z",
  "Type" : "AWS-HMAC",
  "AccessKeyId" : "ASIAX",
  "SecretAccessKey" : "se/cr+et",
  "Token" : "to=ken",
  "Expiration" : "2026-11-23T12:00:00Z"
}`
	if diff := cmp.Diff(want, string(d.Body())); diff != "" {
		t.Error(diff)
	}
	if !json.Valid(d.Body()) || d.ContentLength()[0] != fmt.Sprint(len(want)) || d.LastModified()[0] != "Mon, 23 Nov 2026 11:00:00 GMT" {
		t.Errorf("length %v, last modified %v", d.ContentLength(), d.LastModified())
	}
}

func TestSecretsShowNowhere(t *testing.T) {
	c := Credentials{AccessKeyID: "ASIAX", SecretAccessKey: "hush", SessionToken: "hush"}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+" "+verb+"\n", c, &c)
		fmt.Fprintf(&out, verb+"\n", c.SecretAccessKey)
	}
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "c", c, "p", &c, "s", c.SecretAccessKey)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "c", c, "p", &c, "s", c.SecretAccessKey)
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(b)
	d := newDocument(&c)
	fmt.Fprintf(&out, "%v %s %+v %#v %d", d, d, d, d, d)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "d", d)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "d", d)
	if s := out.String(); strings.Contains(s, "hush") || strings.Contains(s, fmt.Sprintf("%x", "hush")) || strings.Contains(s, strings.Trim(fmt.Sprint([]byte("hush")), "[]")) {
		t.Errorf("a secret shows:\n%s", s)
	}
}
