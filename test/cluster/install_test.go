//go:build cluster

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	stateDir    = "/run/kube2iam-cni"
	proxyPort   = "8181"
	pluginFile  = "/opt/cni/bin/kube2iam-cni"
	conflist    = "/etc/cni/net.d/10-pods.conflist"
	baseRoleARN = "arn:aws:iam::123456789012:role/"
)

// chainedEntry is what an administrator adds to the network's plugins.
const chainedEntry = `{
  "type": "kube2iam-cni",
  "proxyIP": "auto",
  "proxyPort": ` + proxyPort + `,
  "stateDir": "` + stateDir + `",
  "backend": "auto",
  "guard": true
}`

// installPlugin puts the plugin in place on the running node: the binary first, so that no pod finds its entry without it.
func installPlugin(t *testing.T, n *node) {
	t.Helper()
	n.must(t, "cp", filepath.Join(n.state, "bin", "kube2iam-cni"), pluginFile)
	text, err := os.ReadFile(n.path(conflist))
	if err != nil {
		t.Fatal(err)
	}
	var network map[string]any
	if err := json.Unmarshal(text, &network); err != nil {
		t.Fatal(err)
	}
	plugins, ok := network["plugins"].([]any)
	if !ok {
		t.Fatalf("%s has no plugins: %s", conflist, text)
	}
	network["plugins"] = append(plugins, json.RawMessage(chainedEntry))
	text, err = json.MarshalIndent(network, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	// containerd loads a network again when its file is renamed into place.
	partial := n.path(conflist + ".tmp")
	if err := os.WriteFile(partial, text, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(partial, n.path(conflist)); err != nil {
		t.Fatal(err)
	}
}

// startProxy runs the proxy on the node with the rights of its ServiceAccount in the cluster, and the node user's in the cloud.
func startProxy(t *testing.T, n *node) {
	t.Helper()
	n.must(t, "kubectl", "apply", "--filename="+manifest(t, "access.yaml"))
	n.must(t, "kubectl", "annotate", "namespace", "default", `iam.amazonaws.com/allowed-roles=["*"]`)
	token := n.must(t, "kubectl", "create", "token", "kube2iam-proxy", "--namespace=kube-system", "--duration=1h")
	kubeconfig := filepath.Join(n.state, "pki", "kube2iam-proxy.kubeconfig")
	if err := os.WriteFile(kubeconfig, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://%s:6443", certificate-authority: %s/pki/ca.crt}}]
users: [{name: proxy, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: proxy}}]
current-context: test
`, nodeIP, n.state, strings.TrimSpace(token)), 0o600); err != nil {
		t.Fatal(err)
	}
	n.daemon(t, "kube2iam-proxy", "env", "--ignore-environment",
		"AWS_ACCESS_KEY_ID="+nodeUser.id, "AWS_SECRET_ACCESS_KEY="+nodeUser.secret, "AWS_REGION="+region,
		filepath.Join(n.state, "bin", "kube2iam-proxy"),
		"--kubeconfig", kubeconfig, "--node", nodeName, "--state-dir", stateDir, "--base-role-arn", baseRoleARN,
		"--sts-endpoint", cloudURL, "--metadata-addr", metadataIP, "--app-port", proxyPort, "--metrics-port", "8182",
		"--log-level", "debug", "--namespace-restrictions")
	client := n.network().client()
	await(t, 30*time.Second, "proxy ready", func(ctx context.Context) error {
		return ok(ctx, client, "http://"+nodeIP+":8182/healthz")
	})
}
