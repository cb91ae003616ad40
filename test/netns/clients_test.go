package netns

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// boto3 is a user's program that configures neither an endpoint nor credentials.
const boto3 = `
import boto3, sys
session = boto3.session.Session()
print(session.get_credentials().method)
print(session.client("sts", endpoint_url=sys.argv[1]).get_caller_identity()["Arn"])
`

// forceV1 makes a pod's clients use IMDSv1. The AWS CLI and boto3 have no switch for it; they
// use it if they get no token. So the pod's own packet filter resets their connection at the
// PUT.
func (n *node) forceV1(s *testbed.Sandbox) {
	n.filter(s, "--string", "PUT /latest/api/token", "-j", "REJECT", "--reject-with", "tcp-reset")
}

// countTokens counts the pod's requests with a session token, for tokensSent.
func (n *node) countTokens(s *testbed.Sandbox) {
	n.filter(s, "--icase", "--string", "x-aws-ec2-metadata-token:")
}

func (n *node) filter(s *testbed.Sandbox, match ...string) {
	n.t.Helper()
	args := append([]string{"-A", "OUTPUT", "-p", "tcp", "--dport", "80", "-m", "string", "--algo", "bm"}, match...)
	_, err := s.Netns.Run(n.t.Context(), n.ClientEnv(), "iptables-nft", args...)
	n.must(err)
}

func (n *node) tokensSent(s *testbed.Sandbox) int {
	n.t.Helper()
	list, err := s.Netns.Run(n.t.Context(), n.ClientEnv(), "iptables-nft", "-L", "OUTPUT", "-v", "-x", "-n")
	n.must(err)
	for line := range strings.Lines(list) {
		if strings.Contains(line, "metadata-token:") {
			count, err := strconv.Atoi(strings.Fields(line)[0])
			n.must(err)
			return count
		}
	}
	n.t.Fatalf("no rule counts the tokens:\n%s", list)
	return 0
}

// TestUnmodifiedClients runs Debian's AWS CLI and boto3 in the pod: they find the pod's
// credentials, and STS takes them.
func TestUnmodifiedClients(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		n.proxy()
		for _, version := range []string{"v2", "v1"} {
			pod := n.run("client-"+version, "app")
			n.countTokens(pod)
			if version == "v1" {
				n.forceV1(pod)
			}
			arn := "arn:aws:sts::" + testbed.Account + ":assumed-role/app/default." + pod.Name
			run := func(name string, args ...string) string {
				t.Helper()
				out, err := pod.Netns.Run(t.Context(), n.ClientEnv(), name, args...)
				if err != nil {
					t.Errorf("IMDS%s: %v", version, err)
				}
				return out
			}
			cli := run("/usr/bin/aws", "sts", "get-caller-identity", "--endpoint-url", n.STS.URL(), "--query", "Arn", "--output", "text")
			if cli != arn+"\n" {
				t.Errorf("IMDS%s: to the AWS CLI the pod is %q, want %q", version, cli, arn)
			}
			if diff := cmp.Diff("iam-role\n"+arn+"\n", run("/usr/bin/python3", "-c", boto3, n.STS.URL())); diff != "" {
				t.Errorf("IMDS%s: boto3's method and identity (-want +got):\n%s", version, diff)
			}
			// Either asks for the list and for the document.
			if sent, want := n.tokensSent(pod), map[string]int{"v2": 4, "v1": 0}[version]; sent != want {
				t.Errorf("IMDS%s: %d requests with a token, want %d", version, sent, want)
			}
		}
	})
}

// cloudInit crawls the metadata by cloud-init's EC2 data source, with version 2 if asked, and
// prints the keys.
const cloudInit = `
import sys, urllib.request
from cloudinit.sources.helpers import ec2
headers = None
if sys.argv[1] == "v2":
    put = urllib.request.Request("http://169.254.169.254/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    token = urllib.request.urlopen(put).read().decode()
    headers = lambda url: {"X-aws-ec2-metadata-token": token}
metadata = ec2.get_instance_metadata(headers_cb=headers)
print(*sorted(metadata))
`

// TestCloudInitCrawls: Debian's cloud-init gets all metadata that is listed. A listed name
// without an answer would end its crawl.
func TestCloudInitCrawls(t *testing.T) {
	onThese(t, []setup{routed}, func(t *testing.T, n *node) {
		n.proxy(slices.Concat(impatient, []string{"--metadata-deny", "^/[^/]+/user-data", "--metadata-deny", "/placement/host-id$"})...)
		listed := n.get(n.run("reader", "app"), "/latest/meta-data/")
		if !strings.Contains(listed.body, "iam/") || strings.Contains(listed.body, "identity-credentials") {
			t.Fatalf("the pod's listing: %s", listed)
		}
		for _, version := range []string{"v1", "v2"} {
			for name, role := range map[string]string{"with": "app", "without": ""} {
				pod := n.run(name+"-role-"+version, role)
				out, err := pod.Netns.Run(t.Context(), n.ClientEnv(), "/usr/bin/python3", "-c", cloudInit, version)
				n.must(err)
				var want []string
				for key := range strings.FieldsSeq(listed.body) {
					if key = strings.TrimSuffix(key, "/"); key != "iam" || role != "" {
						want = append(want, key)
					}
				}
				slices.Sort(want)
				if diff := cmp.Diff(want, strings.Fields(out)); diff != "" {
					t.Errorf("IMDS%s, %s a role: cloud-init's keys (-want +got):\n%s", version, name, diff)
				}
				t.Logf("IMDS%s, %s a role: %d keys", version, name, len(strings.Fields(out)))
			}
		}
	})
}

// TestIMDS26OtherMetadata: a pod reads the instance's other metadata through the proxy, and only
// the proxy asks the real service.
func TestIMDS26OtherMetadata(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		n.proxy()
		pod := n.run("curious", "app")
		token := n.request(pod, http.MethodPut, "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds", "60")
		if token.status != http.StatusOK || token.body == "" {
			t.Fatalf("PUT token: %s", token)
		}
		for path, want := range map[string]string{
			"/latest/meta-data/instance-id":                    testbed.InstanceID,
			"/latest/meta-data/placement/availability-zone":    testbed.AvailabilityZone,
			"/latest/meta-data/placement/availability-zone/":   testbed.AvailabilityZone,
			"/latest/dynamic/instance-identity/document":       `"region": "` + testbed.Region + `"`,
			"/latest/meta-data/iam/info":                       ":instance-profile/app",
			"/latest/meta-data/iam/../local-ipv4":              testbed.NodeIP.String(),
			"/latest/meta-data//placement/./availability-zone": testbed.AvailabilityZone,
		} {
			for _, header := range [][]string{nil, {"X-aws-ec2-metadata-token", token.body}} {
				if got := n.get(pod, path, header...); got.status != http.StatusOK || !strings.Contains(got.body, want) {
					t.Errorf("%s with %v: %s, want %q", path, header, got, want)
				}
			}
		}
		for _, r := range n.IMDS.Requests() {
			if r.Source != testbed.NodeIP {
				t.Errorf("%s asked the real metadata service for %s", r.Source, r.URI)
			}
		}
	})
}

// TestFirstRequest: a request made when ADD returns is served, before the API server reports the
// pod's IP and before STS was called for it.
func TestFirstRequest(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy()
		for _, name := range []string{"one", "two"} {
			pod := n.pending(name, "app")
			n.must(n.Add(t.Context(), pod))
			n.wantSession(pod, "app", n.get(pod, credentials+"app"))
		}
	})
}
