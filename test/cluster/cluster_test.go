//go:build cluster

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/awserr"
	"github.com/aws/aws-sdk-go/service/s3"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// TestCluster runs its parts on one node, in this order.
func TestCluster(t *testing.T) {
	n := startNode(t)
	c := startCloud(t, n)
	startUnprotected(t, n, c)
	n.bare = n.ruleset(t)
	install(t, n)
	c.metadata.Reset()
	for _, test := range []struct {
		name string
		run  func(*testing.T, *node, *cloud)
	}{
		{"a pod that came before is adopted", testAdopted},
		{"helm and kustomize make the same, and the API server takes it", testManifests},
		{"the plugin is chained", testChained},
		{"a pod starts about as fast", testStart},
		{"the node's own key lists no bucket", testNodeKey},
		{"programs in a pod list a bucket", testListBucket},
		{"without the annotation they have no credentials", testNoRole},
		{"aws s3 ls in a pod", testAWSCommand},
		{"a pod whose role cannot be had has an event", testEvents},
		{"a pod that takes the metrics port takes no probe", testMetricsPortTaken},
		{"the first request of each of a hundred pods succeeds", testHundredPods},
		{"two hundred pods that come and go leave nothing", testChurn},
		{"the primary CNI does what it likes with its configuration", testPrimary},
		{"ten upgrades lose no request", testUpgrades},
		{"a proxy that is killed is back", testCrash},
		{"after a reboot all is as before", testReboot},
		{"the order of the two DaemonSets does not matter", testOrder},
		{"uninstalled, the node is what it was", testUninstall},
		{"the documents' commands work as they stand", testDocuments},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.run(t, n, c)
			if asked := c.metadata.CredentialRequests(); len(asked) > 0 {
				t.Errorf("the real metadata service was asked for credentials: %+v", asked)
			}
		})
	}
}

// unprotected is a pod that is older than the plugin.
const unprotected = "before-plugin"

// startUnprotected starts a pod that gets the node's credentials. It is the control: without the
// plugin, pods reach the metadata service.
func startUnprotected(t *testing.T, n *node, c *cloud) {
	t.Helper()
	n.must(t, "kubectl", "apply", "--filename="+testdata(t, unprotected+".yaml"))
	got := n.outcomes(t, "app="+unprotected, 1)[unprotected]
	if got.Error != "" {
		t.Fatalf("without the plugin the pod's request failed: %s", got.Error)
	}
	if len(c.metadata.CredentialRequests()) == 0 {
		t.Fatal("without the plugin the metadata service was not asked: the pod has its credentials from elsewhere")
	}
}

// testChained expects a record of a new pod. A pod that is older than the plugin must release its
// address, which requires a successful DEL.
func testChained(t *testing.T, n *node, _ *cloud) {
	n.createPod(t, "idle")
	n.awaitPhase(t, "idle", "Running")
	records, err := attachment.In(n.path(stateDir)).List()
	if err != nil {
		t.Fatal(err)
	}
	var pods []string
	for _, r := range records {
		pods = append(pods, r.Pod.Namespace+"/"+r.Pod.Name)
	}
	slices.Sort(pods)
	if diff := cmp.Diff([]string{"default/" + unprotected, "default/idle"}, pods); diff != "" {
		t.Errorf("pods on record, the one that came before and the new one (-want +got):\n%s", diff)
	}

	ip := n.must(t, "kubectl", "get", "pod", unprotected, "--output=jsonpath={.status.podIP}")
	lease := n.path("/var/lib/cni/networks/pods/" + ip)
	if _, err := os.Stat(lease); err != nil {
		t.Fatalf("the address of a running pod: %v", err)
	}
	n.must(t, "kubectl", "delete", "pod", unprotected)
	await(t, podLimit, "the address given back", func(context.Context) error {
		if _, err := os.Stat(lease); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s: %v, want that it is gone", lease, err)
		}
		return nil
	})
}

// testNodeKey expects S3 to refuse the node's own key. So the later parts list the bucket with
// temporary credentials.
func testNodeKey(t *testing.T, _ *node, c *cloud) {
	_, err := c.s3(t, nodeUser).ListObjectsV2WithContext(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String(bucket)})
	var refused awserr.RequestFailure
	if !errors.As(err, &refused) || refused.Code() != "AccessDenied" {
		t.Errorf("list %s with the node's own key: %v, want AccessDenied", bucket, err)
	}
}

// listing is the output of the image s3lister.
type listing struct {
	SDK, Provider, AccessKeyID string
	Objects                    []string
}

func testListBucket(t *testing.T, n *node, _ *cloud) {
	n.createPod(t, "list-bucket")
	n.awaitPhase(t, "list-bucket", "Succeeded", "Failed")
	for _, sdk := range []string{"v1", "v2"} {
		log := n.must(t, "kubectl", "logs", "list-bucket", "--container=sdk-"+sdk)
		var got listing
		if err := json.Unmarshal([]byte(log), &got); err != nil {
			t.Errorf("SDK %s: %v: %s", sdk, err, log)
			continue
		}
		want := listing{SDK: sdk, Provider: "EC2RoleProvider", Objects: []string{object}}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(listing{}, "AccessKeyID")); diff != "" {
			t.Errorf("SDK %s (-want +got):\n%s", sdk, diff)
		}
	}
}

// testNoRole expects each SDK to report that no provider of its chain had credentials.
func testNoRole(t *testing.T, n *node, _ *cloud) {
	n.createPod(t, "list-bucket-no-role")
	if phase := n.awaitPhase(t, "list-bucket-no-role", "Succeeded", "Failed"); phase != "Failed" {
		t.Errorf("the pod is %s, want Failed", phase)
	}
	for sdk, says := range map[string]string{"v1": "NoCredentialProviders", "v2": "no EC2 IMDS role found"} {
		log := n.must(t, "kubectl", "logs", "list-bucket-no-role", "--container=sdk-"+sdk)
		if !strings.Contains(log, says) {
			t.Errorf("SDK %s: its error does not say %q: %s", sdk, says, log)
		}
	}
}

// testAWSCommand runs Debian's command, in an image without any program of this project.
func testAWSCommand(t *testing.T, n *node, _ *cloud) {
	n.createPod(t, "aws-s3-ls")
	phase := n.awaitPhase(t, "aws-s3-ls", "Succeeded", "Failed")
	got := n.must(t, "kubectl", "logs", "aws-s3-ls")
	if phase != "Succeeded" || !strings.HasSuffix(got, " "+object+"\n") {
		t.Errorf("aws s3 ls s3://%s/ %s and printed %q, want a line that ends in %s", bucket, phase, got, object)
	}
}
