package testbed

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// proxyStart is how long the proxy may take until it is ready.
const proxyStart = 30 * time.Second

// StartProxy runs kube2iam-proxy in the node's namespace as its DaemonSet does, with additional
// flags, and waits until its health port reports ready. The proxy gets its AWS credentials from the
// metadata service.
func (b *Bed) StartProxy(ctx context.Context, flags ...string) (*Process, error) {
	p, err := b.LaunchProxy(flags...)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, proxyStart)
	defer cancel()
	return p, p.await(ctx, func() error { return b.Healthy(ctx) })
}

// LaunchProxy is StartProxy without the wait.
func (b *Bed) LaunchProxy(flags ...string) (*Process, error) {
	proxy, err := b.tools.Path("kube2iam-proxy")
	if err != nil {
		return nil, err
	}
	kubeconfig, err := b.kubeconfig()
	if err != nil {
		return nil, err
	}
	args := append([]string{
		"--node", NodeName,
		"--kubeconfig", kubeconfig,
		"--sts-endpoint", b.STS.URL(),
		"--base-role-arn", RoleBase,
		"--state-dir", b.StateDir,
		"--log-level", "debug",
	}, flags...)
	env := b.ClientEnv()[:2] // without the region, which the proxy has to find out
	return b.start(b.Node, env, proxy, args...)
}

// kubeconfig writes a kubeconfig for the API server and returns its path. The connection uses TLS
// and so HTTP/2, as in a cluster.
func (b *Bed) kubeconfig() (string, error) {
	file := filepath.Join(b.Dir, "kubeconfig")
	return file, os.WriteFile(file, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority-data: %s}}]
contexts: [{name: test, context: {cluster: test}}]
current-context: test
`, b.KubeAPI.URL(), base64.StdEncoding.EncodeToString(b.KubeAPI.CA())), 0o600)
}

// Healthy returns nil if the proxy's health port reports ready.
func (b *Bed) Healthy(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:8182/healthz", nil)
	if err != nil {
		return err
	}
	resp, err := b.Node.HTTP().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("healthz: %s", resp.Status)
	}
	return nil
}

// StartAgent runs the agent in the node's namespace as its DaemonSet does, with additional flags.
func (b *Bed) StartAgent(flags ...string) (*Process, error) {
	agent, err := b.tools.Path("kube2iam-agent")
	if err != nil {
		return nil, err
	}
	return b.start(b.Node, b.ClientEnv()[:1], agent, b.agentArgs(flags)...)
}

// AgentRound has the agent make one round and returns its output.
func (b *Bed) AgentRound(ctx context.Context, flags ...string) (string, error) {
	agent, err := b.tools.Path("kube2iam-agent")
	if err != nil {
		return "", err
	}
	p, err := startProcess(b.Node, b.ClientEnv()[:1], agent, b.agentArgs(append(flags, "--once"))...)
	if err != nil {
		return "", err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		p.Kill()
	}
	if p.err != nil {
		return p.Log(), fmt.Errorf("the agent's round: %w: %s", p.err, p.log.tail())
	}
	return p.Log(), nil
}

func (b *Bed) agentArgs(flags []string) []string {
	return append([]string{
		"run", "--state-dir", b.StateDir, "--cni-conf-dir", b.confDir(), "--cni-cache-dir", filepath.Join(b.Dir, "cni"), "--netns-dir", filepath.Join(b.Dir, "netns"), "--interval", "1s",
	}, flags...)
}
