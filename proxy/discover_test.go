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

// instance is a metadata service that answers some time after the node's start, if at all.
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

func TestDiscoveryWaitsForTheMetadataService(t *testing.T) {
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

func TestDiscoveryTakesNothingThatMakesNoSense(t *testing.T) {
	for name, texts := range map[string]map[string]string{
		"no JSON":          {"/latest/meta-data/iam/info": "<html>"},
		"no profile":       {"/latest/meta-data/iam/info": `{"InstanceProfileArn":"arn:aws:iam::123456789012:user/x"}`},
		"no account":       {"/latest/meta-data/iam/info": `{"InstanceProfileArn":"arn:aws:iam::x:instance-profile/x"}`},
		"a page of HTML":   {"/latest/meta-data/iam/security-credentials/": "<html>\n</html>"},
		"an empty list":    {"/latest/meta-data/iam/security-credentials/": ""},
		"more than a role": {"/latest/meta-data/iam/security-credentials/": "a\nb"},
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
