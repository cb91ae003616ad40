package testbed

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// proxyStart bounds the proxy's way to readiness.
const proxyStart = 30 * time.Second

// StartProxy runs kube2iam-proxy in the node's namespace as its DaemonSet would, with these flags after its usual ones,
// and waits until its health port says that it is ready. Its AWS credentials come from the metadata service.
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
	args := append([]string{
		"--node", NodeName,
		"--api-server", b.KubeAPI.URL(),
		"--sts-endpoint", b.STS.URL(),
		"--base-role-arn", RoleBase,
		"--state-dir", b.StateDir,
		"--log-level", "debug",
	}, flags...)
	env := b.ClientEnv()[:2] // in which region it is, the proxy has to find out
	return b.start(b.Node, env, proxy, args...)
}

// Healthy asks the proxy's health port.
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
