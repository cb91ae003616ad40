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

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// client is an unmodified AWS client and its behaviour, by its source or by experiment.
type client struct {
	name string
	// command prints an access key ID and a session token, or the ARN that STS knows it by, and
	// again for each line of input.
	command func(n *node) ([]string, error)
	// patient ones try again for longer than STS is slow in these tests.
	patient bool
	// denied, plain and later are of what they say where STS refuses the role, where the pod has
	// none, and where STS has a fault that passes. Those of AWS's command line, of boto3 and of
	// JavaScript's default chain name no reason but that there is none to be found.
	denied, plain, later string
	// put401 and put503 are of what they say where a request for a session token is refused; empty
	// where they use version 1 then. get401 is of what they say where a token ends before its time;
	// empty where they get another.
	put401, put503, get401 string
}

var clients = []client{
	{name: "go-v1", command: built("clients", "go-v1"), patient: true,
		denied: "AssumeRoleUnauthorizedAccess", plain: "NoCredentialProviders", later: "EC2RoleRequestError", get401: "401"},
	{name: "go-v2", command: built("clients", "go-v2"), patient: true,
		denied: "StatusCode: 403", plain: "StatusCode: 404", later: "failed to get app EC2 IMDS role credentials"},
	{name: "minio-go", command: built("clients", "minio-go"), patient: true,
		denied: "403 Forbidden", plain: "404", later: "500", put401: "401 Unauthorized", put503: "503 Service Unavailable", get401: "401"},
	{name: "js-v3", command: javaScript("main.mjs"), denied: "Could not load credentials", plain: "Could not load credentials", later: "Could not load credentials", get401: "Could not load credentials"},
	{name: "boto3", command: python, denied: "no credentials", plain: "no credentials", later: "no credentials", get401: "no credentials"},
	{name: "aws-cli", command: awsCLI, denied: "Unable to locate credentials", plain: "Unable to locate credentials", later: "Unable to locate credentials", get401: "Unable to locate credentials"},
}

// onClients runs a test for each client, each on a node of its own.
func onClients(t *testing.T, test func(t *testing.T, n *node, c client)) {
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			onThese(t, []setup{routedIPTables}, func(t *testing.T, n *node) { test(t, n, c) })
		})
	}
}

var programs = sync.OnceValues(func() (testbed.Tools, error) { return testbed.BuildClients(context.Background()) })

func built(name string, args ...string) func(*node) ([]string, error) {
	return func(*node) ([]string, error) {
		tools, err := programs()
		if err != nil {
			return nil, err
		}
		path, err := tools.Path(name)
		return append([]string{path}, args...), err
	}
}

func javaScript(file string) func(*node) ([]string, error) {
	return func(n *node) ([]string, error) {
		main, err := built(file)(n)
		if err != nil {
			return nil, err
		}
		node, err := exec.LookPath("node")
		return append([]string{node}, main...), err
	}
}

// careless are clients that take every answer with status 200 for credentials.
var careless = []client{
	{name: "js-v2", command: javaScript("v2.mjs"), denied: "EC2 Metadata creds request returned error", plain: "EC2 Metadata roleName request returned error"},
	{name: "s3cmd", command: s3cmd, denied: "Configuration file not available", plain: "Configuration file not available"},
	{name: "fog-aws", command: fog, denied: "403 Forbidden", plain: "404 Not Found"},
}

// s3cmd prints the credentials in its configuration, which it generates if it has no file.
func s3cmd(*node) ([]string, error) {
	return []string{"/bin/sh", "-c", `set -e
all=$(/usr/bin/s3cmd --dump-config)
echo "$all" | sed -n 's/^access_key = //p;s/^access_token = //p' | paste -sd ' '`}, nil
}

func fog(*node) ([]string, error) {
	return []string{"/usr/bin/ruby", "-e", `require "fog/aws"
s = Fog::Storage.new(provider: "AWS", use_iam_profile: true, region: "eu-west-1")
puts [:@aws_access_key_id, :@aws_session_token].map { |v| s.instance_variable_get(v) }.join(" ")`}, nil
}

func python(*node) ([]string, error) {
	return []string{"/usr/bin/python3", "-c", `
import boto3, sys
boto3.set_stream_logger("botocore.utils") # which says why, to those who ask
while True:
    found = boto3.session.Session().get_credentials()
    if not found:
        sys.exit("no credentials")
    found = found.get_frozen_credentials()
    print(found.access_key, found.token, flush=True)
    if not sys.stdin.readline():
        break
`}, nil
}

func awsCLI(n *node) ([]string, error) {
	return []string{"/bin/sh", "-c", `while /usr/bin/aws sts get-caller-identity --endpoint-url "$0" --query Arn --output text; do read -r again || exit 0; done; exit 1`, n.STS.URL()}, nil
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

// starts runs a program that gets the pod's credentials by a client.
func (n *node) starts(pod *testbed.Sandbox, c client) *program {
	n.t.Helper()
	command, err := c.command(n)
	n.must(err)
	in, input, err := os.Pipe() // a file: Wait does not wait for its other end
	n.must(err)
	output, out := io.Pipe()
	p := &program{n: n, pod: pod, in: input, out: bufio.NewReader(output), ended: make(chan error, 1)}
	go func() {
		err := pod.Netns.Do(func() error {
			cmd := exec.CommandContext(n.t.Context(), command[0], command[1:]...)
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

// again makes the program get its credentials again.
func (p *program) again() { io.WriteString(p.in, "\n") }

// wantOwn reads the program's credentials and wants them to be of the pod's own role.
func (p *program) wantOwn(role string) {
	p.n.t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.n.t.Fatalf("%s: %v: %s", p.pod.Name, err, p.failed())
	}
	session := p.pod.Namespace + "." + p.pod.Name
	id, token, _ := strings.Cut(strings.TrimSpace(line), " ")
	if id == "arn:aws:sts::"+testbed.Account+":assumed-role/"+role+"/"+session {
		return // STS took them
	}
	for _, call := range p.n.STS.Calls() {
		if call.Issued == id && id != "" && token != "" && call.RoleARN == testbed.RoleBase+role && call.SessionName == session {
			return
		}
	}
	p.n.t.Errorf("%s has %q, which is not of %s", p.pod.Name, id, role)
}

// wantFailure wants the program to end without credentials and with a message.
func (p *program) wantFailure(says string) {
	p.n.t.Helper()
	if said := p.failed(); !strings.Contains(said, says) {
		p.n.t.Errorf("%s said %q, want %q", p.pod.Name, said, says)
	}
}

// failed waits until the program ends without credentials and returns its standard error.
func (p *program) failed() string {
	p.n.t.Helper()
	p.in.Close()
	go io.Copy(io.Discard, p.out)
	if err := <-p.ended; err == nil {
		p.n.t.Errorf("%s found credentials", p.pod.Name)
	}
	return p.stderr.String()
}
