//go:build cluster

package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/util/yaml"
)

const chart = "../../conf/helm/kube2iam-cni"

// given are the values that have to be given, as conf/kustomize has them.
var given = []string{
	"--set=plugin.image=kube2iam-cni:unset", "--set=proxy.image=kube2iam-proxy:unset", "--set=baseRoleARN=arn:aws:iam::123456789012:role/",
}

// helm runs the command; its error has what it said.
func (n *node) helm(args ...string) (string, error) {
	c := exec.Command(filepath.Join(n.state, "bin", "helm"), args...)
	c.Env = append(os.Environ(), "HOME="+n.state) // it keeps nothing of the machine's
	out, err := c.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("helm %s: %w: %s", args[0], err, out)
	}
	return string(out), err
}

// objects are those of a manifest, by kind and name.
func objects(t *testing.T, manifest string) map[string]any {
	t.Helper()
	all := make(map[string]any)
	for decoder := yaml.NewYAMLOrJSONDecoder(strings.NewReader(manifest), 4096); ; {
		var object map[string]any
		if err := decoder.Decode(&object); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("%v in:\n%s", err, manifest)
		}
		if object != nil {
			all[fmt.Sprint(object["kind"], " ", object["metadata"].(map[string]any)["name"])] = object
		}
	}
}

// testManifests compares what helm makes with what kustomize makes, and has the API server check both by its schemas.
func testManifests(t *testing.T, n *node, _ *cloud) {
	if out, err := n.helm(append([]string{"lint", "--strict", chart}, given...)...); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	rendered, err := n.helm(append([]string{"template", "kube2iam-cni", chart, "--namespace=kube-system", "--kube-version=1.37.2"}, given...)...)
	if err != nil {
		t.Fatal(err)
	}
	base, err := filepath.Abs("../../conf/kustomize")
	if err != nil {
		t.Fatal(err)
	}
	kustomized := n.must(t, "kubectl", "kustomize", base)
	if diff := cmp.Diff(objects(t, kustomized), objects(t, rendered)); diff != "" {
		t.Errorf("of kustomize (-) and helm (+):\n%s", diff)
	}

	presets, err := filepath.Glob(chart + "/presets/*.yaml")
	if err != nil || len(presets) == 0 {
		t.Fatalf("presets: %v, %v", presets, err)
	}
	variants := map[string][]string{"everything": {
		"--set=entry.proxyPort=9181", "--set=entry.backend=nftables", "--set=entry.guard=true", "--set=entry.mark=0x2000", "--set=entry.path=netns", "--set=entry.stateDir=/run/other",
		"--set=proxy.args={--namespace-restrictions,--session-tags}", "--set=proxy.metricsPort=9182", "--set=serviceAccount.annotations.a=b", "--set=nodeSelector.a=b",
		"--set=plugin.imagePullPolicy=Always", "--set=proxy.imagePullPolicy=Never",
	}, "defaults": nil}
	for _, preset := range presets {
		variants[filepath.Base(preset)] = []string{"--values=" + preset}
	}
	for name, values := range variants {
		rendered, err := n.helm(append(append([]string{"template", "kube2iam-cni", chart, "--namespace=kube-system", "--kube-version=1.37.2"}, given...), values...)...)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if _, err := n.output(t.Context(), strings.NewReader(rendered), "kubectl", "apply", "--dry-run=server", "--validate=strict", "--filename=-"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if name == "everything" {
			for _, flag := range []string{"--proxy-port=9181", "--app-port=9181", "--backend=nftables", "--mark=0x2000", "--path=netns", "--state-dir=/run/other", "--namespace-restrictions", "--metrics-port=9182"} {
				if !strings.Contains(rendered, flag) {
					t.Errorf("%s has no %s", name, flag)
				}
			}
		}
	}
	for _, file := range []string{"access.yaml", "agent.yaml", "proxy.yaml"} {
		n.must(t, "kubectl", "apply", "--dry-run=server", "--validate=strict", "--filename="+filepath.Join(base, file))
	}
	if _, err := n.output(t.Context(), strings.NewReader(uninstallJob(t)), "kubectl", "apply", "--dry-run=server", "--validate=strict", "--filename=-"); err != nil {
		t.Error(err)
	}
	// What cannot be is refused before anything is applied.
	for _, wrong := range [][]string{
		nil, {"--set=plugin.image=x"}, append(given[:2:2], "--set=baseRoleARN=my-role"), append(given[:3:3], "--set=entry.backend=ipvs"), append(given[:3:3], "--set=entry.proxyport=1"),
		append(given[:3:3], "--set=proxy.metricsPort=0"), append(given[:3:3], "--set=places.programs=opt"), append(given[:3:3], "--set=proxi.image=x"),
	} {
		if out, err := n.helm(append([]string{"template", "kube2iam-cni", chart, "--kube-version=1.37.2"}, wrong...)...); err == nil || !strings.Contains(err.Error(), "values don't meet the specifications") {
			t.Errorf("%q was taken: %v\n%s", wrong, err, bytes.TrimSpace([]byte(out)))
		}
	}
}
