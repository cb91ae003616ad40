//go:build cluster

package cluster

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/credentials"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/aws/signer/v4"
	"github.com/aws/aws-sdk-go/service/s3"

	"github.com/kube2iam-cni/kube2iam-cni/test/imdstap"
)

const (
	region     = "us-east-1"
	bucket     = "team-a"
	cloudURL   = "http://" + outsideIP + ":9000" // STS and S3
	mockServes = "127.0.0.1:1338"                // Amazon's mock, behind the recording address
)

// object is the one object in the bucket.
const object = "hello.txt"

// keyPair is the long-term key of a user.
type keyPair struct{ id, secret string }

var (
	// owner owns the buckets and creates the users. No tested program has its key.
	owner = keyPair{id: "bucket-owner", secret: "bucket-owner-secret"}
	// nodeUser is the node's identity for STS. On EC2, the instance profile provides it.
	nodeUser = keyPair{id: "AKIANODEUSER", secret: "node-user-secret"}
)

// temporaryOnly allows listing the bucket with temporary credentials only. A pod with the node's
// own key is refused.
const temporaryOnly = `{
  "Version": "2012-10-17",
  "Statement": [{
    "Effect": "Allow",
    "Action": ["s3:ListBucket"],
    "Resource": ["arn:aws:s3:::` + bucket + `"],
    "Condition": {"StringEquals": {"aws:principaltype": "AssumedRole"}}
  }]
}`

// cloud is the services outside the node.
type cloud struct {
	metadata *imdstap.Tap // in front of Amazon's mock
	client   *http.Client // dials from outside the node
}

// startCloud starts STS, S3 and the metadata service, and puts an object into the bucket.
func startCloud(t *testing.T, n *node) *cloud {
	t.Helper()
	c := new(cloud)
	c.start(t, n)
	c.makeNodeUser(t)
	c.fillBucket(t)
	return c
}

// start starts the services outside the node. They are the node's processes, so a reboot ends them.
func (c *cloud) start(t *testing.T, n *node) {
	t.Helper()
	c.client = n.outside().client()
	n.daemon(t, "minio", "ip", "netns", "exec", "outside", "env",
		"MINIO_ROOT_USER="+owner.id, "MINIO_ROOT_PASSWORD="+owner.secret, "MINIO_SITE_REGION="+region, "MINIO_BROWSER=off",
		"minio", "server", "--address", outsideIP+":9000", filepath.Join(n.state, "minio"))
	n.daemon(t, "ec2-metadata-mock", "ip", "netns", "exec", "outside", "env", "HOME=/nonexistent",
		"ec2-metadata-mock", "--hostname", "127.0.0.1", "--port", "1338")
	outside := n.outside()
	metadata, err := imdstap.Start(imdstap.Options{
		Address: metadataIP + ":80", Listen: outside.listen, Backend: mockServes,
		Dial: func(network, address string) (net.Conn, error) {
			return outside.dial(n.suite.Context(), network, address)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	n.suite.Cleanup(metadata.Close)
	c.metadata = metadata
	await(t, 30*time.Second, "MinIO ready", func(ctx context.Context) error {
		return ok(ctx, c.client, cloudURL+"/minio/health/ready")
	})
	await(t, 30*time.Second, "metadata mock ready", func(ctx context.Context) error {
		return ok(ctx, c.client, "http://"+mockServes+"/latest/meta-data/instance-id")
	})
}

// makeNodeUser creates the node's user and its policy. MinIO imports them as an archive in the
// format of its export.
func (c *cloud) makeNodeUser(t *testing.T) {
	t.Helper()
	var archive bytes.Buffer
	files := zip.NewWriter(&archive)
	for name, content := range map[string]any{
		"policies.json":      map[string]any{"temporary-only": json.RawMessage(temporaryOnly)},
		"users.json":         map[string]any{nodeUser.id: map[string]string{"secretKey": nodeUser.secret, "status": "enabled"}},
		"user_mappings.json": map[string]any{nodeUser.id: map[string]any{"version": 1, "policy": "temporary-only"}},
	} {
		f, err := files.Create("iam-assets/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.NewEncoder(f).Encode(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := files.Close(); err != nil {
		t.Fatal(err)
	}
	// MinIO reports that it is ready before it accepts this request.
	await(t, 30*time.Second, "the node's user imported into MinIO", func(ctx context.Context) error {
		body := bytes.NewReader(archive.Bytes())
		request, err := http.NewRequestWithContext(ctx, http.MethodPut, cloudURL+"/minio/admin/v3/import-iam", body)
		if err != nil {
			return err
		}
		if _, err := v4.NewSigner(owner.credentials()).Sign(request, body, "s3", region, time.Now()); err != nil {
			return err
		}
		response, err := c.client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			var said bytes.Buffer
			said.ReadFrom(response.Body)
			return fmt.Errorf("%s: %s", response.Status, said.Bytes())
		}
		return nil
	})
}

func (c *cloud) fillBucket(t *testing.T) {
	t.Helper()
	client := c.s3(t, owner)
	if _, err := client.CreateBucketWithContext(t.Context(), &s3.CreateBucketInput{Bucket: aws.String(bucket)}); err != nil {
		t.Fatal(err)
	}
	put := &s3.PutObjectInput{Bucket: aws.String(bucket), Key: aws.String(object), Body: strings.NewReader("hello\n")}
	if _, err := client.PutObjectWithContext(t.Context(), put); err != nil {
		t.Fatal(err)
	}
}

// s3 returns a client of S3 with a long-term key.
func (c *cloud) s3(t *testing.T, key keyPair) *s3.S3 {
	t.Helper()
	sess, err := session.NewSession(&aws.Config{
		Region: aws.String(region), Endpoint: aws.String(cloudURL), S3ForcePathStyle: aws.Bool(true),
		HTTPClient: c.client, Credentials: key.credentials(), MaxRetries: aws.Int(0),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s3.New(sess)
}

func (k keyPair) credentials() *credentials.Credentials {
	return credentials.NewStaticCredentials(k.id, k.secret, "")
}
