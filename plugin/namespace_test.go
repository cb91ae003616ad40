package main

import (
	"bytes"
	"log/slog"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

const (
	service4, service6 = testhost.Service4, testhost.Service6
	pod4, pod6         = testhost.Pod4, testhost.Pod6
)

// testNode is the plugin on a host of its own.
type testNode struct {
	*testhost.Host
	*plugin
	out, errors bytes.Buffer
}

// newNode makes a node with a pod that is "routed" or "bridged".
func newNode(t *testing.T, kind, backend string) *testNode {
	t.Helper()
	n := &testNode{Host: testhost.New(t, kind, backend)}
	n.plugin = &plugin{
		System: attach.Host(),
		stdout: &n.out,
		log:    slog.New(slog.NewTextHandler(&n.errors, nil)),
	}
	if netnstest.InUserNamespace() {
		// It may not list the programs of an interface, so CanBypass would be true. There are none.
		n.FindLink = func(netnsPath, ifName string) (*hostlink.Link, error) {
			link, err := hostlink.Find(netnsPath, ifName)
			if link != nil {
				link.CanBypass = false
			}
			return link, err
		}
	}
	n.IPTablesDirs = []string{n.Commands}
	n.Now = func() time.Time { return time.Date(2026, 11, 23, 12, 0, 0, 0, time.FixedZone("", 3600)) }
	return n
}
