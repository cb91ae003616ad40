package testbed

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/imdstap"
	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
)

// What the metadata service knows of the node, an EC2 instance.
const (
	InstanceID       = "i-0a1b2c3d4e5f60718"
	AvailabilityZone = Region + "b"

	credentialsPath = "/latest/meta-data/iam/security-credentials/"
	mockAddr        = "127.0.0.1:1338"
)

// nodePrincipal is the node with its credentials. Because they are an instance's, AssumeRole with
// them is not role chaining.
var nodePrincipal = sts.Principal{
	AccessKeyID:     "ASIATESTBEDNODE00001",
	SecretAccessKey: "testbed/node/secret+access+key",
	SessionToken:    "testbed/node/session+token==",
	ARN:             "arn:aws:sts::" + Account + ":assumed-role/" + NodeRole + "/" + InstanceID,
	UserID:          "AROATESTBEDNODE000001:" + InstanceID,
}

// NodeAccessKeyID is the access key ID of the node's own credentials.
var NodeAccessKeyID = nodePrincipal.AccessKeyID

// mockConfig returns the configuration of the metadata mock, as far as it differs from the
// defaults.
func mockConfig() any {
	now := time.Now().UTC()
	stamp := func(t time.Time) string { return t.Format("2006-01-02T15:04:05Z") }
	return map[string]any{
		"metadata": map[string]any{
			"paths": map[string]string{"iam-security-credentials": credentialsPath + NodeRole},
			"values": map[string]any{
				"instance-id":                   InstanceID,
				"placement-availability-zone":   AvailabilityZone,
				"placement-region":              Region,
				"local-ipv4":                    NodeIP.String(),
				"iam-security-credentials-role": NodeRole,
				"iam-security-credentials": map[string]string{
					"Code":            "Success",
					"LastUpdated":     stamp(now),
					"Type":            "AWS-HMAC",
					"AccessKeyId":     nodePrincipal.AccessKeyID,
					"SecretAccessKey": nodePrincipal.SecretAccessKey,
					"Token":           nodePrincipal.SessionToken,
					"Expiration":      stamp(now.Add(6 * time.Hour)),
				},
			},
		},
		"dynamic": map[string]any{
			"values": map[string]any{
				"instance-identity-document": map[string]any{
					"accountId":        Account,
					"availabilityZone": AvailabilityZone,
					"instanceId":       InstanceID,
					"privateIp":        NodeIP.String(),
					"region":           Region,
					"version":          "2017-09-30",
				},
			},
		},
	}
}

// serveMetadata runs Amazon's metadata mock behind the tap.
func (b *Bed) serveMetadata(ctx context.Context) error {
	mock, err := b.tools.Path("ec2-metadata-mock")
	if err != nil {
		return err
	}
	config, err := json.MarshalIndent(mockConfig(), "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(b.Dir, "conf", "ec2-metadata-mock.json")
	if err := os.WriteFile(file, config, 0o644); err != nil {
		return err
	}
	p, err := b.start(b.AWS, b.ClientEnv(), mock, "--config-file", file, "--hostname", "127.0.0.1", "--port", "1338")
	if err != nil {
		return err
	}
	if err := p.await(ctx, func() error {
		conn, err := b.AWS.DialContext(ctx, "tcp", mockAddr)
		if err == nil {
			conn.Close()
		}
		return err
	}); err != nil {
		return fmt.Errorf("metadata mock: %w", err)
	}
	tap := imdstap.Options{Address: MetadataAddr, Listen: b.AWS.Listen, Backend: mockAddr, Listed: "identity-credentials/", Dial: b.AWS.Dial}
	if b.IMDS, err = imdstap.Start(tap); err != nil || !b.ipv6 {
		return err
	}
	tap.Address = MetadataAddr6
	b.IMDS6, err = imdstap.Start(tap)
	return err
}
