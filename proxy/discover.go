package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// metadata is the node's own, as imds.Upstream has it.
type metadata interface {
	Get(ctx context.Context, path string) (string, error)
}

// discover fills in the base ARN and the default role from what the metadata service says of the node's own, trying until
// it answers or ctx ends.
func discover(ctx context.Context, o *options, node metadata, log *slog.Logger) error {
	if !o.discoverBaseARN && !o.discoverDefaultRole {
		return nil
	}
	for wait := time.Second; ; wait = min(2*wait, 30*time.Second) {
		err := discoverOnce(ctx, o, node)
		if err == nil {
			log.Info("discovered", "base role ARN", o.rules.BaseARN, "default role", o.rules.DefaultRole)
			if err := o.rules.Check(); err != nil {
				return &usageError{fmt.Errorf("default role: %w", err)}
			}
			return nil
		}
		log.Warn("asking the metadata service for the node's own role failed; trying again", "in", wait, "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
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
		if o.rules.BaseARN, err = roles.BaseARN(account + ":role/"); err != nil {
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
