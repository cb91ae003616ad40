//go:build cluster

package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
)

const chart = "../../conf/helm/kube2iam-cni"

// given are the required values, as in conf/kustomize.
var given = []string{
	"--set=plugin.image=kube2iam-cni:unset", "--set=proxy.image=kube2iam-proxy:unset", "--set=baseRoleARN=arn:aws:iam::123456789012:role/",
}

// helm runs the command and returns its output, also in the error.
func (n *node) helm(args ...string) (string, error) {
	c := exec.Command(filepath.Join(n.state, "bin", "helm"), args...)
	c.Env = append(os.Environ(), "HOME="+n.state) // not the machine's settings
	out, err := c.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("helm %s: %w: %s", args[0], err, out)
	}
	return string(out), err
}

// objects returns the objects of a manifest by kind and name.
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

// testManifests compares the output of helm with that of kustomize. The API server validates both.
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
		"--set=entry.proxyPort=9181", "--set=entry.backend=nftables", "--set=entry.guard=true", "--set=entry.mark=0x2000", "--set=entry.datapath=pod", "--set=entry.stateDir=/run/other",
		"--set=proxy.args={--namespace-restrictions,--session-tags}", "--set=proxy.metricsPort=9182", "--set=proxy.metricsAddress=127.0.0.1", "--set=serviceAccount.annotations.a=b", "--set=nodeSelector.a=b",
		"--set=plugin.imagePullPolicy=Always", "--set=proxy.imagePullPolicy=Never", "--set=entry.proxyIP=fd00::1",
		"--set=imagePullSecrets[0].name=my-registry", "--set=plugin.env[0].name=KUBE2IAM_AGENT_PROXY_IP", "--set=plugin.env[0].valueFrom.fieldRef.fieldPath=status.hostIP",
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
			for _, flag := range []string{"--proxy-port=9181", "--app-port=9181", "--backend=nftables", "--mark=0x2000", "--datapath=pod", "--state-dir=/run/other", "--namespace-restrictions", "--metrics-port=9182", "--metrics-address=127.0.0.1", `["/kube2iam-proxy","live","--state-dir=/run/other"]`, "mountPath: /run/other/proxy"} {
				if !strings.Contains(rendered, flag) {
					t.Errorf("%s has no %s", name, flag)
				}
			}
			for text, want := range map[string]int{"imagePullSecrets:\n        - name: my-registry": 2, "fieldPath: status.hostIP": 1} {
				if got := strings.Count(rendered, text); got != want {
					t.Errorf("%s has %q %d times, want %d", name, text, got, want)
				}
			}
		}
	}
	for _, file := range []string{"access.yaml", "agent.yaml", "proxy.yaml"} {
		n.must(t, "kubectl", "apply", "--dry-run=server", "--validate=strict", "--filename="+filepath.Join(base, file))
	}
	if _, err := n.output(t.Context(), strings.NewReader(uninstallJob(t)), "kubectl", "create", "--dry-run=server", "--validate=strict", "--filename=-"); err != nil {
		t.Error(err)
	}
	n.uninstallChart(t)
	hardened(t, objects(t, kustomized))
	if out, err := n.helm(append([]string{"template", "x", chart, "--kube-version=1.37.2", "--set=podMonitor.enabled=true", "--show-only=templates/podmonitor.yaml"}, given...)...); err != nil || !strings.Contains(out, `"[${1}]:8182"`) {
		t.Errorf("%v: %s", err, out)
	}
	// The schema refuses invalid values before anything is applied.
	for _, wrong := range [][]string{
		nil, {"--set=plugin.image=x"}, append(given[:2:2], "--set=baseRoleARN=my-role"), append(given[:3:3], "--set=entry.backend=ipvs"), append(given[:3:3], "--set=entry.proxyport=1"),
		append(given[:3:3], "--set=entry.proxyIP=here"), append(given[:3:3], "--set=proxy.args={--app-port=9}"), append(given[:2:2], "--set=baseRoleARN=arn:aws:iam::123456789012:role/a b"),
		append(given[:3:3], "--set=proxy.metricsPort=0"), append(given[:3:3], "--set=proxy.metricsAddress=localhost"), append(given[:3:3], "--set=proxy.args={--metrics-address=::1}"), append(given[:3:3], "--set=cni.binDir=opt"), append(given[:3:3], "--set=proxi.image=x"),
		append(given[:3:3], "--set=imagePullSecrets={my-registry}"), append(given[:3:3], "--set=plugin.env[0].name=KUBE2IAM_AGENT_STATE_DIR"),
	} {
		if out, err := n.helm(append([]string{"template", "kube2iam-cni", chart, "--kube-version=1.37.2"}, wrong...)...); err == nil || !strings.Contains(err.Error(), "values don't meet the specifications") {
			t.Errorf("%q was taken: %v\n%s", wrong, err, bytes.TrimSpace([]byte(out)))
		}
	}
	if _, err := n.helm(append([]string{"template", "x", chart, "--kube-version=1.37.2", "--set=entry.proxyPort=8182"}, given...)...); err == nil || !strings.Contains(err.Error(), "are both 8182") {
		t.Errorf("one port for pods and metrics: %v", err)
	}
	const noBase = "baseRoleARN is empty"
	for values, want := range map[string]string{
		`proxy.args=[]`: noBase, `proxy.args=["--base-role"]`: noBase, `proxy.args=["--base-role-arn="]`: noBase, `proxy.args=["--base-role-arn"]`: noBase, `proxy.args=["--auto-discover-base-arn=false"]`: noBase,
		`proxy.args=["--auto-discover-base-arn"]`: "", `proxy.args=["--auto-discover-base-arn=true"]`: "", `proxy.args=["--base-role-arn=arn:aws:iam::1:role/"]`: "",
		`proxy.env=[{"name":"AWS_REGION","value":"true"}]`: noBase, `proxy.env=[{"name":"KUBE2IAM_BASE_ROLE_ARN","value":""}]`: noBase, `proxy.env=[{"name":"KUBE2IAM_BASE_ROLE_ARN"}]`: noBase,
		`proxy.env=[{"name":"KUBE2IAM_AUTO_DISCOVER_BASE_ARN","value":"false"}]`: noBase, `proxy.env=[{"name":"KUBE2IAM_AUTO_DISCOVER_BASE_ARN"}]`: noBase,
		`proxy.env=[{"name":"KUBE2IAM_BASE_ROLE_ARN","value":"arn:aws:iam::1:role/"}]`: "", `proxy.env=[{"name":"KUBE2IAM_AUTO_DISCOVER_BASE_ARN","value":"true"}]`: "",
		`proxy.env=[{"name":"KUBE2IAM_BASE_ROLE_ARN","valueFrom":{"configMapKeyRef":{"name":"aws","key":"base"}}}]`: "",
	} {
		_, err := n.helm(append([]string{"template", "x", chart, "--kube-version=1.37.2", "--set-json=" + values}, given[:2]...)...)
		if got := fmt.Sprint(err); (err == nil) != (want == "") || !strings.Contains(got, want) {
			t.Errorf("no baseRoleARN and %s: %v", values, err)
		}
	}
}

// uninstallChart compares the Jobs of the chart with the Job of the repository, also for other
// directories.
func (n *node) uninstallChart(t *testing.T) {
	t.Helper()
	show := append([]string{"template", "x", chart, "--namespace=kube-system", "--kube-version=1.37.2", "--show-only=templates/uninstall.yaml"}, given...)
	one, err := n.helm(append(show, "--set=uninstall.nodes={NODE}")...)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../conf/uninstall/job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(objects(t, string(text)), objects(t, one)); diff != "" {
		t.Errorf("the Job of the repository (-) and of the chart (+):\n%s", diff)
	}
	two, err := n.helm(append(show, "--set=uninstall.nodes={"+nodeName+",gke-production-default-pool-3f1a9c2e-x7q2}", "--values="+chart+"/presets/k3s.yaml", "--set=entry.stateDir=/run/other", "--set=imagePullSecrets[0].name=my-registry", "--set=plugin.env[0].name=KUBE2IAM_AGENT_MARK", "--set=plugin.env[0].value=0x2000")...)
	if err != nil {
		t.Fatal(err)
	}
	for _, flag := range []string{"--cni-conf-dir=/var/lib/rancher/k3s/agent/etc/cni/net.d", "--cni-bin-dir=/var/lib/rancher/k3s/data/cni", "--state-dir=/run/other", "name: my-registry", "value: \"0x2000\""} {
		if strings.Count(two, flag) != 2 {
			t.Errorf("no %s in both:\n%s", flag, two)
		}
	}
	if _, err := n.output(t.Context(), strings.NewReader(two), "kubectl", "create", "--dry-run=server", "--validate=strict", "--filename=-"); err != nil {
		t.Error(err)
	}
}

// hardened compares the containers with the privileges in docs/security.md.
func hardened(t *testing.T, all map[string]any) {
	t.Helper()
	capabilities := map[string]string{"DaemonSet kube2iam-proxy": "[]", "DaemonSet kube2iam-cni-agent": "[NET_ADMIN NET_RAW SYS_ADMIN SYS_CHROOT DAC_OVERRIDE CHOWN]"}
	for name, added := range capabilities {
		text, err := json.Marshal(all[name])
		if err != nil {
			t.Fatal(err)
		}
		var set appsv1.DaemonSet
		if err := json.Unmarshal(text, &set); err != nil {
			t.Fatal(err)
		}
		spec := set.Spec.Template.Spec
		if len(spec.Containers) != 1 || len(spec.InitContainers) > 0 || !spec.HostNetwork || spec.PriorityClassName != "system-node-critical" {
			t.Errorf("%s: %+v", name, spec)
		}
		c := spec.Containers[0]
		security := c.SecurityContext
		if security == nil || security.Privileged != nil || *security.AllowPrivilegeEscalation || !*security.ReadOnlyRootFilesystem || security.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault ||
			fmt.Sprint(security.Capabilities.Drop) != "[ALL]" || fmt.Sprint(security.Capabilities.Add) != added || len(c.Resources.Requests) != 2 {
			t.Errorf("%s: %+v", name, security)
		}
		// A pod with a hostPort would receive probes of a port.
		for _, probe := range []*corev1.Probe{c.StartupProbe, c.ReadinessProbe, c.LivenessProbe} {
			if probe != nil && probe.Exec == nil {
				t.Errorf("%s: a probe that is no command: %+v", name, probe)
			}
		}
		for _, m := range c.VolumeMounts {
			if name == "DaemonSet kube2iam-proxy" && m.ReadOnly != (m.MountPath == stateDir) {
				t.Errorf("%s: %+v", name, m)
			}
		}
		talks := spec.AutomountServiceAccountToken == nil
		if proxy := name == "DaemonSet kube2iam-proxy"; talks != proxy || spec.HostPID == proxy || proxy && (set.Spec.UpdateStrategy.RollingUpdate.MaxSurge.IntValue() != 1 || (c.StartupProbe == nil || c.ReadinessProbe == nil || c.LivenessProbe == nil || len(c.VolumeMounts) != 2)) {
			t.Errorf("%s: token %v, host's PID namespace %v, %+v", name, talks, spec.HostPID, set.Spec.UpdateStrategy)
		}
	}
	rules, err := json.Marshal(all["ClusterRole kube2iam-proxy"].(map[string]any)["rules"])
	if want := `[{"apiGroups":[""],"resources":["pods"],"verbs":["get","list","watch"]},{"apiGroups":[""],"resources":["namespaces"],"verbs":["list","watch"]},{"apiGroups":[""],"resources":["events"],"verbs":["create","patch"]}]`; err != nil || string(rules) != want {
		t.Errorf("the proxy may do %s, %v", rules, err)
	}
}
