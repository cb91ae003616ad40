package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// metadata is the node's own, as imds.Upstream has it.
type metadata interface {
	Get(ctx context.Context, path string) (string, error)
}

// persist tries until it succeeds or ctx ends: a node's metadata service may come up after its pods.
func persist(ctx context.Context, what string, log *slog.Logger, try func() error) error {
	for wait := time.Second; ; wait = min(2*wait, 30*time.Second) {
		err := try()
		if err == nil {
			return nil
		}
		log.Warn("asking the metadata service for "+what+" failed; trying again", "in", wait, "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// region asks the metadata service for the node's region.
func region(node metadata, log *slog.Logger) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		var name string
		err := persist(ctx, "the node's region", log, func() error {
			text, err := node.Get(ctx, "/latest/meta-data/placement/region")
			if name = strings.TrimSpace(text); err == nil && !regionName.MatchString(name) {
				err = fmt.Errorf("placement/region: %q is not the name of a region", shortened(name))
			}
			return err
		})
		return name, err
	}
}

// regionName becomes a part of a host's name.
var regionName = regexp.MustCompile(`^[a-z]{2,}(-[a-z]+)+-[0-9]+$`)

func shortened(s string) string { return s[:min(len(s), 128)] }

// partition is that of the roles that are configured, empty where none is with its ARN.
func partition(o *options) string {
	for _, arn := range []string{o.rules.BaseARN, o.rules.DefaultRole, o.throughRole} {
		if parts := strings.SplitN(arn, ":", 3); len(parts) == 3 {
			return parts[1]
		}
	}
	return ""
}

// discover fills in the base ARN and the default role from what the metadata service says of the node's own, trying until
// it answers or ctx ends.
func discover(ctx context.Context, o *options, node metadata, log *slog.Logger) error {
	if !o.discoverBaseARN && !o.discoverDefaultRole {
		return nil
	}
	if err := persist(ctx, "the node's own role", log, func() error { return discoverOnce(ctx, o, node) }); err != nil {
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
