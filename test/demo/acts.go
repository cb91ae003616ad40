package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/test/ruleset"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	metadata    = "http://169.254.169.254/latest"
	credentials = metadata + "/meta-data/iam/security-credentials/"
)

// problem shows what a pod gets if nothing protects the metadata service.
func problem(ctx context.Context, s *stage) error {
	s.title("A node without kube2iam-cni: a pod asks the metadata service and gets the node's own role")
	s.text("The node and its pods are network namespaces on this machine. Pods are connected by the real bridge plugin and host-local")
	s.text("IPAM, called through libcni. Behind 169.254.169.254 stands AWS's own metadata mock. The Kubernetes API and STS are small")
	s.text("stand-ins of this repository (test/kubeapi, test/sts); `make test-cluster` does all this on a real Kubernetes and MinIO.")
	pod, err := s.bed.RunPod(ctx, "default", "before", nil)
	if err != nil {
		return err
	}
	name := s.curl(ctx, pod, credentials)
	s.expect(strings.HasPrefix(name, testbed.NodeRole), "any pod may have the node's role: this is what has to end")
	return s.bed.StopPod(ctx, pod)
}

func setUp(ctx context.Context, s *stage) error {
	s.title("Chain the plugin into the network's configuration, and start the proxy on the node")
	entry := testbed.Kube2IAM("auto")
	s.bed.SetChain(entry)
	conflist, err := s.bed.Conflist()
	if err != nil {
		return err
	}
	s.block(string(conflist))
	s.bed.PutRole("reader", "")
	s.bed.PutRole("writer", "")
	proxy, err := s.bed.StartProxy(ctx)
	if err != nil {
		return err
	}
	s.text("kube2iam-proxy runs as process %d and is ready.", proxy.PID())
	return nil
}

func pods(ctx context.Context, s *stage) (err error) {
	s.title("Two pods start: one with the role reader, two with the role writer")
	if s.one, err = s.bed.RunPod(ctx, "default", "one", map[string]string{"iam.amazonaws.com/role": "reader"}); err != nil {
		return err
	}
	if s.two, err = s.bed.RunPod(ctx, "default", "two", map[string]string{"iam.amazonaws.com/role": "writer"}); err != nil {
		return err
	}
	s.text("one has %s, two has %s. The plugin's rules on the node:", s.one.IP, s.two.IP)
	rules, err := s.rules()
	if err != nil {
		return err
	}
	s.block(strings.Join(rules, "\n"))
	s.expect(count(rules, "nft ip bridged:") == 2 && count(rules, "nft bridge ports4:") == 2,
		"one redirection for each pod, bound to its own port of the bridge and its own address")
	s.expect(count(rules, "reject with tcp reset") > 0 && count(rules, "drop") > 0, "and a guard that refuses whatever was not redirected")
	s.text("The record of who holds %s, which the proxy reads:", s.one.IP)
	record, err := os.ReadFile(filepath.Join(s.bed.StateDir, "by-ip", s.one.IP.String()))
	if err != nil {
		return err
	}
	s.block(string(record))
	return nil
}

func ownRole(ctx context.Context, s *stage) error {
	s.title("Pod one asks as every AWS SDK does: a session token, the role's name, its credentials")
	token := s.token(ctx, s.one)
	name := s.curl(ctx, s.one, "-H", token, credentials)
	s.expect(strings.HasPrefix(name, "reader\n"), "its own role")
	doc := s.curl(ctx, s.one, "-H", token, credentials+"reader")
	s.expect(strings.Contains(doc, `"Code" : "Success"`), "credentials of that role, from STS")
	calls := s.bed.STS.Calls()
	s.expect(len(calls) == 2, fmt.Sprintf("STS was asked %d times: once for each pod, when it was bound to the node and before it asked", len(calls)))
	id := s.curl(ctx, s.one, "-H", token, metadata+"/meta-data/instance-id")
	s.expect(strings.HasPrefix(id, testbed.InstanceID), "the instance's other metadata comes from the real service")
	return nil
}

func otherRole(ctx context.Context, s *stage) error {
	s.title("Pod two gets its own role, and not pod one's")
	token := s.token(ctx, s.two)
	name := s.curl(ctx, s.two, "-H", token, credentials)
	s.expect(strings.HasPrefix(name, "writer\n"), "its own role")
	doc := s.curl(ctx, s.two, "-H", token, credentials+"reader")
	s.expect(strings.HasSuffix(doc, "HTTP 404"), "pod one's role is not there for it")
	doc = s.curl(ctx, s.two, "-H", s.token(ctx, s.one), credentials)
	s.expect(strings.HasSuffix(doc, "HTTP 401"), "pod one's session token is worth nothing to it")
	doc = s.curl(ctx, s.two, credentials+testbed.NodeRole)
	s.expect(strings.HasSuffix(doc, "HTTP 404"), "and the node's role is not there either")
	return nil
}

func noRole(ctx context.Context, s *stage) (err error) {
	s.title("A pod without the annotation gets 404")
	if s.three, err = s.bed.RunPod(ctx, "default", "three", nil); err != nil {
		return err
	}
	doc := s.curl(ctx, s.three, credentials)
	s.expect(strings.HasSuffix(doc, "HTTP 404"), "no role, no credentials: every SDK goes on to its next provider")
	return nil
}

func directDial(ctx context.Context, s *stage) error {
	s.title("The proxy serves redirected connections only")
	doc := s.curl(ctx, s.two, "-H", "X-Forwarded-For: "+s.one.IP.String(), fmt.Sprintf("http://%s:8181/latest/meta-data/iam/security-credentials/reader", testbed.NodeIP))
	s.expect(strings.Contains(doc, "curl: "), "dialled directly it resets the connection, whoever one says one is")
	return nil
}

func removal(ctx context.Context, s *stage) error {
	s.title("The pods end: DEL takes rules and records back")
	for _, pod := range []*testbed.Sandbox{s.one, s.two, s.three} {
		if err := s.bed.StopPod(ctx, pod); err != nil {
			return err
		}
	}
	rules, err := s.rules()
	if err != nil {
		return err
	}
	s.block(strings.Join(rules, "\n"))
	s.expect(count(rules, "@eth0") == 0, "no redirection is left; the guard stays")
	records, err := filepath.Glob(filepath.Join(s.bed.StateDir, "attachments", "*"))
	if err != nil {
		return err
	}
	s.expect(len(records) == 0, "no record is left")
	leaks := s.bed.Leaks()
	s.expect(len(leaks) == 1, "of all requests for credentials, one reached the real service: that of step 1")
	return nil
}

// token makes a session, shows it, and returns the header with the token.
func (s *stage) token(ctx context.Context, pod *testbed.Sandbox) string {
	answer := s.curl(ctx, pod, "-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 300", metadata+"/api/token")
	token, _, _ := strings.Cut(answer, "\n")
	return "X-aws-ec2-metadata-token: " + token
}

// rules returns the pods' elements and the guard's rules on the node.
func (s *stage) rules() (lines []string, err error) {
	err = s.bed.Node.Do(func() error {
		lines, err = ruleset.Own()
		return err
	})
	return slices.DeleteFunc(lines, func(line string) bool {
		return !ownElementOrGuard.MatchString(line)
	}), err
}

// ownElementOrGuard matches the elements of the pods and the rules of the guard, by their comments.
var ownElementOrGuard = regexp.MustCompile(`@eth0|comment "(answers: )?(reset TCP|drop)"`)

func count(rules []string, part string) int {
	n := 0
	for _, r := range rules {
		if strings.Contains(r, part) {
			n++
		}
	}
	return n
}
