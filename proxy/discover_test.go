package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// instance is a metadata service that answers from a point in time on.
type instance struct {
	up    time.Time
	texts map[string]string
	asked int
}

func (i *instance) Get(_ context.Context, path string) (string, error) {
	i.asked++
	if text, ok := i.texts[path]; ok && !time.Now().Before(i.up) {
		return text, nil
	}
	return "", errors.New("no answer")
}

func TestDiscoveryRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := &instance{up: time.Now().Add(5 * time.Minute), texts: map[string]string{
			"/latest/meta-data/iam/info":                  `{"Code":"Success","InstanceProfileArn":"arn:aws-cn:iam::123456789012:instance-profile/workers"}`,
			"/latest/meta-data/iam/security-credentials/": "node\n",
		}}
		o := &options{discoverBaseARN: true, discoverDefaultRole: true}
		if err := discover(t.Context(), o, node, slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
		if want := (roles.Rules{BaseARN: "arn:aws-cn:iam::123456789012:role/", DefaultRole: "node"}); o.rules.BaseARN != want.BaseARN || o.rules.DefaultRole != want.DefaultRole {
			t.Errorf("%+v", o.rules)
		}
		if node.asked > 20 {
			t.Errorf("asked %d times in five minutes", node.asked)
		}
	})
}

func TestDiscoveryRejectsMalformedAnswers(t *testing.T) {
	for name, texts := range map[string]map[string]string{
		"no JSON":    {"/latest/meta-data/iam/info": "<html>"},
		"no profile": {"/latest/meta-data/iam/info": `{"InstanceProfileArn":"arn:aws:iam::123456789012:user/x"}`},
		"no account": {"/latest/meta-data/iam/info": `{"InstanceProfileArn":"arn:aws:iam::x:instance-profile/x"}`},
		"HTML":       {"/latest/meta-data/iam/security-credentials/": "<html>\n</html>"},
		"empty list": {"/latest/meta-data/iam/security-credentials/": ""},
		"two roles":  {"/latest/meta-data/iam/security-credentials/": "a\nb"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, base := texts["/latest/meta-data/iam/info"]
				o := &options{discoverBaseARN: base, discoverDefaultRole: !base}
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
				defer cancel()
				var log strings.Builder
				err := discover(ctx, o, &instance{texts: texts}, slog.New(slog.NewTextHandler(&log, nil)))
				if !errors.Is(err, context.DeadlineExceeded) || o.rules.BaseARN != "" || o.rules.DefaultRole != "" || !strings.Contains(log.String(), "trying again") {
					t.Errorf("%v, %+v, logged %s", err, o.rules, log.String())
				}
			})
		})
	}
}

func TestNodeRegion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const path = "/latest/meta-data/placement/region"
		node := &instance{up: time.Now().Add(5 * time.Minute), texts: map[string]string{path: "us-gov-west-1\n"}}
		log := slog.New(slog.DiscardHandler)
		if name, err := nodeRegion(t.Context(), node, log); err != nil || name != "us-gov-west-1" || node.asked > 20 {
			t.Errorf("%q, %v, asked %d times", name, err, node.asked)
		}
		for _, wrong := range []string{"", "<html>", "evil.example/", "us-east-1.evil", "US-EAST-1", "us-east"} {
			node.texts[path] = wrong
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if name, err := nodeRegion(ctx, node, log); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%q is accepted as %q, %v", wrong, name, err)
			}
			cancel()
		}
	})
}

func TestPartition(t *testing.T) {
	for want, o := range map[string]*options{
		"":           {rules: roles.Rules{DefaultRole: "name"}},
		"aws-cn":     {rules: roles.Rules{BaseARN: "arn:aws-cn:iam::123456789012:role/"}},
		"aws-us-gov": {rules: roles.Rules{DefaultRole: "arn:aws-us-gov:iam::123456789012:role/x"}},
		"aws":        {throughRole: "arn:aws:iam::123456789012:role/x"},
	} {
		if got := partition(o); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestServeReturnsNilWhenCanceled cancels the context while serve waits for the node's metadata
// service.
func TestServeReturnsNilWhenCanceled(t *testing.T) {
	for name, o := range map[string]*options{
		"discovery": {discoverBaseARN: true, metadataAddr: "127.0.0.1:1"},
		"region":    {regionalSTS: true, metadataAddr: "127.0.0.1:1", apiServer: "http://127.0.0.1:1"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, key := range []string{"AWS_REGION", "AWS_DEFAULT_REGION"} {
				t.Setenv(key, "")
			}
			t.Setenv("HOME", t.TempDir())
			o.stateDir = t.TempDir()
			ctx, end := context.WithCancel(t.Context())
			defer end()
			var log onWrite = func(line string) {
				if strings.Contains(line, "trying again") {
					end()
				}
			}
			if err := serve(ctx, o, slog.New(slog.NewTextHandler(log, nil))); err != nil || ctx.Err() == nil {
				t.Error(err)
			}
		})
	}
}

// onWrite is an io.Writer that calls a function with each text.
type onWrite func(string)

func (f onWrite) Write(p []byte) (int, error) {
	f(string(p))
	return len(p), nil
}
