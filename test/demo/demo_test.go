package main

import (
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestMain(m *testing.M) { netnstest.MainAsRoot(m) }

// TestDemo runs the demo, which fails if a step does not show what it should.
func TestDemo(t *testing.T) {
	var out strings.Builder
	if code := run(&out); code != 0 {
		t.Errorf("exit status %d:\n%s", code, out.String())
	}
}
