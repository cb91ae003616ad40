package netns

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

var clients = sync.OnceValues(func() (string, error) {
	built, err := testbed.BuildClients(context.Background())
	if err != nil {
		return "", err
	}
	return built.Path("clients")
})

// sdks are those of test/clients; Debian's AWS CLI and boto3 are in TestUnmodifiedClients.
var sdks = []string{"go-v1", "go-v2", "minio-go"}

// onSDKs runs a test for each SDK, on a node of its own each.
func onSDKs(t *testing.T, test func(t *testing.T, n *node, sdk string)) {
	for _, sdk := range sdks {
		t.Run(sdk, func(t *testing.T) {
			onThese(t, []setup{setups[5], setups[7]}, func(t *testing.T, n *node) { test(t, n, sdk) })
		})
	}
}

// program is a user's program that runs in a pod.
type program struct {
	n      *node
	pod    *testbed.Sandbox
	in     io.WriteCloser
	out    *bufio.Reader
	ended  chan error
	stderr bytes.Buffer
}

// starts starts one that gets the pod's credentials by an SDK.
func (n *node) starts(pod *testbed.Sandbox, sdk string) *program {
	n.t.Helper()
	path, err := clients()
	n.must(err)
	in, input, err := os.Pipe() // a file, so that the program's end waits for nobody to close the other
	n.must(err)
	output, out := io.Pipe()
	p := &program{n: n, pod: pod, in: input, out: bufio.NewReader(output), ended: make(chan error, 1)}
	go func() {
		err := pod.Netns.Do(func() error {
			cmd := exec.CommandContext(n.t.Context(), path, sdk)
			cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = n.ClientEnv(), in, out, &p.stderr
			cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
			return cmd.Run()
		})
		in.Close()
		out.Close()
		p.ended <- err
	}()
	n.t.Cleanup(func() { input.Close(); output.Close() })
	return p
}

// again has it get them anew.
func (p *program) again() { io.WriteString(p.in, "\n") }

// wantOwn reads what it has got, and wants that to be the pod's own role's.
func (p *program) wantOwn(role string) {
	p.n.t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.n.t.Fatalf("%s: %v: %s", p.pod.Name, err, p.failed())
	}
	id, token, _ := strings.Cut(strings.TrimSpace(line), " ")
	for _, call := range p.n.STS.Calls() {
		if call.Issued == id && id != "" && token != "" && call.RoleARN == testbed.RoleBase+role && call.SessionName == "default."+p.pod.Name {
			return
		}
	}
	p.n.t.Errorf("%s has the access key %q, which is not of %s", p.pod.Name, id, role)
}

// failed is what it says at its end, after it has found no credentials.
func (p *program) failed() string {
	p.n.t.Helper()
	p.in.Close()
	go io.Copy(io.Discard, p.out)
	if err := <-p.ended; err == nil {
		p.n.t.Errorf("%s found credentials", p.pod.Name)
	}
	return p.stderr.String()
}

// TestSDKs has the SDKs find the pod's credentials by both versions of the protocol, again and again, and across a restart of the
// proxy between a token and its use.
func TestSDKs(t *testing.T) {
	onSDKs(t, func(t *testing.T, n *node, sdk string) {
		proxy := n.proxy(impatient...)
		pod := n.run("pod", "app")
		n.countTokens(pod)
		p := n.starts(pod, sdk)
		p.wantOwn("app")
		if n.tokensSent(pod) == 0 {
			t.Error("no request had a token")
		}
		p.again()
		p.wantOwn("app")
		n.must(proxy.Stop())
		n.proxy(impatient...)
		p.again()
		p.wantOwn("app")

		old := n.run("old", "other")
		n.countTokens(old)
		n.forceV1(old)
		p = n.starts(old, sdk)
		p.wantOwn("other")
		if sent := n.tokensSent(old); sent > 0 {
			t.Errorf("%d requests had a token", sent)
		}
	})
}

// TestSDKsAreTold is what an SDK's user sees where there is nothing to get: at once, and with the reason where the SDK shows one.
func TestSDKsAreTold(t *testing.T) {
	onSDKs(t, func(t *testing.T, n *node, sdk string) {
		n.proxy(impatient...)
		for name, tc := range map[string]struct {
			role string
			says map[string]string
		}{
			"denied": {"nobody", map[string]string{"go-v1": "AssumeRoleUnauthorizedAccess", "go-v2": "AssumeRoleUnauthorizedAccess", "minio-go": "STS refused to let the node assume the role"}},
			"plain":  {"", map[string]string{"go-v1": "NoCredentialProviders", "go-v2": "StatusCode: 404", "minio-go": "404"}},
		} {
			pod := n.run(name, tc.role)
			start := time.Now()
			said := n.starts(pod, sdk).failed()
			if !strings.Contains(said, tc.says[sdk]) {
				t.Errorf("%s: said %q, want %q", name, said, tc.says[sdk])
			}
			if took := time.Since(start); took > 8*time.Second {
				t.Errorf("%s: it took %s", name, took)
			}
		}
	})
}

// TestSDKsWaitForSTS has STS answer late, or with a fault that passes: an SDK gets the pod's credentials in the end, by its own
// patience or when its program asks again.
func TestSDKsWaitForSTS(t *testing.T) {
	onSDKs(t, func(t *testing.T, n *node, sdk string) {
		n.proxy(impatient...)
		for name, fault := range map[string]sts.Fault{
			"slow": {Latency: 1500 * time.Millisecond}, "throttling": sts.Throttled, "unavailable": sts.Unavailable,
		} {
			n.STS.SetFault(fault)
			pod := n.run(name, "app")
			p := n.starts(pod, sdk)
			if name == "slow" {
				p.wantOwn("app")
				n.STS.SetFault(sts.Fault{})
				continue
			}
			p.failed()
			n.STS.SetFault(sts.Fault{})
			n.eventually(func() bool { return n.get(pod, credentials+"app").status == 200 })
			n.starts(pod, sdk).wantOwn("app")
		}
	})
}
