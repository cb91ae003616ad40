// Package layout holds the tests of how the packages may depend on each other.
package layout

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const module = "github.com/kube2iam-cni/kube2iam-cni/"

// allowed is which of our packages each package may import: imports go one way, and what both
// programs share imports nothing.
var allowed = map[string][]string{
	"plugin":           {"pkg/netconf", "pkg/hostlink", "pkg/rules", "pkg/attachment", "pkg/attach"},
	"plugin/agent":     {"pkg/netconf", "pkg/attachment", "pkg/attach", "pkg/agent", "pkg/conflist", "pkg/cnidirs"},
	"proxy":            {"pkg/imds", "pkg/broker", "pkg/pods", "pkg/roles", "pkg/credentials", "pkg/attachment", "pkg/events", "pkg/kube", "pkg/metrics", "pkg/handover", "pkg/unixsocket"},
	"pkg/broker":       {"pkg/imds", "pkg/pods", "pkg/roles", "pkg/credentials"},
	"pkg/pods":         {"pkg/attachment", "pkg/dedup", "pkg/ratelimit"},
	"pkg/events":       {"pkg/pods", "pkg/ratelimit"},
	"pkg/kube":         {},
	"pkg/credentials":  {"pkg/ratelimit", "pkg/roles"},
	"pkg/imds":         {"pkg/attachment", "pkg/credentials", "pkg/dedup", "pkg/ratelimit"},
	"pkg/agent":        {"pkg/attach", "pkg/attachment", "pkg/dedup", "pkg/filelock", "pkg/hostlink", "pkg/netlinkwatch", "pkg/nft", "pkg/rules", "pkg/uplink"},
	"pkg/attach":       {"pkg/attachment", "pkg/hostlink", "pkg/ipfamily", "pkg/netconf", "pkg/rules", "pkg/sockdiag"},
	"pkg/netconf":      {"pkg/attachment"},
	"pkg/hostlink":     {"pkg/ipfamily", "pkg/podnetns"},
	"pkg/podnetns":     {},
	"pkg/netlinkwatch": {},
	"pkg/uplink":       {"pkg/attachment", "pkg/hostlink", "pkg/netlinkwatch"},
	"pkg/filelock":     {},
	"pkg/ipfamily":     {},
	"pkg/conflist":     {},
	"pkg/cnidirs":      {},
	"pkg/handover":     {"pkg/unixsocket"},
	"pkg/unixsocket":   {},
	"pkg/nft":          {},
	"pkg/rules":        {"pkg/nft", "pkg/attachment", "pkg/podnetns"},
	"pkg/sockdiag":     {},
	"pkg/attachment":   {"pkg/filelock", "pkg/ipfamily"},
	"pkg/roles":        {},
	"pkg/metrics":      {},
	"pkg/ratelimit":    {},
	"pkg/dedup":        {},
}

func list(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func TestImportsGoOneWay(t *testing.T) {
	seen := map[string]bool{}
	for _, line := range list(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./plugin/...", "./proxy/...", "./pkg/...") {
		fields := strings.Fields(strings.ReplaceAll(line, module, ""))
		pkg := fields[0]
		seen[pkg] = true
		may, known := allowed[pkg]
		if !known {
			t.Errorf("%s: say here what it may import", pkg)
			continue
		}
		for _, imported := range fields[1:] {
			ours := strings.HasPrefix(imported, "pkg/") || strings.HasPrefix(imported, "plugin") || imported == "proxy" || strings.HasPrefix(imported, "test/")
			if ours && !slices.Contains(may, imported) {
				t.Errorf("%s imports %s", pkg, imported)
			}
		}
	}
	for pkg := range allowed {
		if !seen[pkg] {
			t.Errorf("%s: no such package", pkg)
		}
	}
}

func TestPluginStaysSmall(t *testing.T) {
	for _, dep := range list(t, "-deps", "./plugin") {
		for _, heavy := range []string{"k8s.io/", "github.com/aws/", "github.com/prometheus/", "github.com/urfave/"} {
			if strings.HasPrefix(dep, heavy) {
				t.Errorf("the plugin links %s", dep)
			}
		}
	}
}

func TestOnePackageImportsTheAWSSDK(t *testing.T) {
	var users []string
	for _, line := range list(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./plugin/...", "./proxy/...", "./pkg/...") {
		if strings.Contains(line, "github.com/aws/aws-sdk-go") {
			users = append(users, strings.TrimPrefix(strings.Fields(line)[0], module))
		}
	}
	if d := cmp.Diff([]string{"pkg/credentials"}, users); d != "" {
		t.Error(d)
	}
}
