package rules

import (
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }
