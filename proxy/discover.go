package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"regexp"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// metadata is the node's metadata service.
type metadata interface {
	Get(ctx context.Context, path string) (string, error)
}

// retryMetadata calls ask until it succeeds or ctx ends: pods can start before the metadata service
// answers on a node that boots.
func retryMetadata(ctx context.Context, log *slog.Logger, ask func(context.Context) error) error {
	backoff := wait.Backoff{Duration: time.Second, Factor: 2, Cap: 30 * time.Second, Steps: math.MaxInt}
	return backoff.DelayFunc().Until(ctx, true, true, func(ctx context.Context) (bool, error) {
		err := ask(ctx)
		if err != nil {
			log.Warn("the metadata service does not answer; trying again", "error", err)
		}
		return err == nil, nil
	})
}

// regionName matches the name of a region, which becomes a part of a host name.
var regionName = regexp.MustCompile(`^[a-z]{2,}(-[a-z]+)+-[0-9]+$`)

// nodeRegion asks the metadata service for the node's region until it answers or ctx ends.
func nodeRegion(ctx context.Context, node metadata, log *slog.Logger) (region string, err error) {
	err = retryMetadata(ctx, log, func(ctx context.Context) error {
		text, err := node.Get(ctx, "/latest/meta-data/placement/region")
		if err != nil {
			return err
		}
		if region = strings.TrimSpace(text); !regionName.MatchString(region) {
			return fmt.Errorf("placement/region: %.128q is not the name of a region", region)
		}
		return nil
	})
	return region, err
}

// partition returns the AWS partition of the configured roles, or "" if no ARN is configured.
func partition(o *options) string {
	for _, arn := range []string{o.rules.BaseARN, o.rules.DefaultRole, o.throughRole} {
		if parts := strings.SplitN(arn, ":", 3); len(parts) == 3 {
			return parts[1]
		}
	}
	return ""
}

// discover sets the base ARN and the default role that the options say to discover. It asks the
// metadata service until it answers or ctx ends.
func discover(ctx context.Context, o *options, node metadata, log *slog.Logger) error {
	if !o.discoverBaseARN && !o.discoverDefaultRole {
		return nil
	}
	if err := retryMetadata(ctx, log, func(ctx context.Context) error { return discoverOnce(ctx, o, node) }); err != nil {
		return err
	}
	log.Info("discovered", "base role ARN", o.rules.BaseARN, "default role", o.rules.DefaultRole)
	if err := o.rules.Validate(); err != nil {
		return &usageError{fmt.Errorf("default role: %w", err)}
	}
	return nil
}

func discoverOnce(ctx context.Context, o *options, node metadata) error {
	if o.discoverBaseARN {
		text, err := node.Get(ctx, "/latest/meta-data/iam/info")
		if err != nil {
			return err
		}
		var info struct{ InstanceProfileArn string }
		if err := json.Unmarshal([]byte(text), &info); err != nil {
			return fmt.Errorf("iam/info: %w", err)
		}
		account, _, ok := strings.Cut(info.InstanceProfileArn, ":instance-profile/")
		if !ok {
			return fmt.Errorf("iam/info: %q is not the ARN of an instance profile", info.InstanceProfileArn)
		}
		if o.rules.BaseARN, err = roles.ParseBaseARN(account + ":role/"); err != nil {
			return err
		}
	}
	if o.discoverDefaultRole {
		name, err := node.Get(ctx, "/latest/meta-data/iam/security-credentials/")
		if err != nil {
			return err
		}
		name = strings.TrimSpace(name)
		if name == "" || strings.ContainsAny(name, "\n/") {
			return fmt.Errorf("security-credentials: %q is not the name of a role", name)
		}
		o.rules.DefaultRole = name
	}
	return nil
}
