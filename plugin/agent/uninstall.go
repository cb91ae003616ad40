package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/places"
)

// uninstallCommand takes the plugin off a node: `kube2iam-agent uninstall`.
func uninstallCommand(stdout, stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name:  "uninstall",
		Usage: "take entry, rules and state off this node",
		Description: `Stop the agent first: it would put everything back. Then this takes the entry out of every network configuration,
removes all rules and the guard, and the state directory. Pods can be made and deleted throughout.

FROM THEN ON PODS REACH THE NODE'S OWN CREDENTIALS. A proxy that still runs serves nobody any more.

The plugin itself stays while pods run that were attached through it, for their DELs; call this again to have it
removed once they are gone.`,
		Flags: slices.Concat(entryFlags(), nodeFlags()),
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("uninstall: unexpected argument %q", c.Args().First())
			}
			ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, os.Interrupt)
			defer stop()
			return uninstall(ctx, c, stdout, slog.New(slog.NewTextHandler(stderr, nil)))
		},
	}
}

// uninstall goes backwards through what install and ADD did: nothing calls the plugin any more before what it made is removed.
func uninstall(ctx context.Context, c *cli.Context, stdout io.Writer, log *slog.Logger) error {
	conf, err := agentConf(c)
	if err != nil {
		return err
	}
	if err := enter(c.String("host-root")); err != nil {
		return err
	}
	where, err := lookForPlaces(c)
	if err != nil {
		return fmt.Errorf("uninstall: the container runtime's configuration cannot be read: give --cni-conf-dir and --cni-bin-dir: %w", err)
	}
	if err := checkPlaces(where.Configurations, conf.StateDir); err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	info, err := node.NewAgentInfo(os.Args, nil, conf.StateDir)
	if err != nil {
		return err
	}
	info.Status = "the plugin is being uninstalled"
	lock, err := node.TryLockAgent(ctx, info) // no agent may start meanwhile
	if errors.Is(err, node.ErrAgent) {
		return fmt.Errorf("uninstall: an agent would put everything back: stop it first (delete its DaemonSet, or stop its unit): %w", err)
	}
	if err != nil {
		return err
	}
	defer lock.Unlock()
	did, err := conflist.Unchain(where.Configurations, pluginName)
	for _, line := range did {
		fmt.Fprintln(stdout, line)
	}
	if err != nil {
		return fmt.Errorf("uninstall: the rules stay, for the plugin may still be called: %w", err)
	}
	n := node.New(settings(conf), node.Host(), log)
	defer n.Close()
	attachments, err := n.Uninstall(ctx)
	// A runtime may have called the plugin just before the entry went: what its ADD made is found by looking again.
	for range looks {
		if err != nil {
			break
		}
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(time.Second):
			var more int
			more, err = n.Uninstall(ctx)
			attachments += more
		}
	}
	if err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	fmt.Fprintf(stdout, "rules and state of %d attachments removed\n", attachments)
	cached, err := cache(c, where.Configurations).Through()
	if err != nil {
		return fmt.Errorf("uninstall: the program stays: %w", err)
	}
	program := filepath.Join(where.Programs, pluginName)
	if cached > 0 {
		fmt.Fprintf(stdout, "%s stays: %d pods were attached through it; call this again once they are gone\n", program, cached)
		return nil
	}
	if err := os.Remove(program); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("uninstall: %w", err)
	} else if err == nil {
		fmt.Fprintln(stdout, "program "+program+" removed")
	}
	return nil
}

// looks is how often uninstall looks again, a second apart: an ADD takes a fraction of one.
const looks = 2

// checkPlaces tells whether these are the places that the plugin was installed by: others would be left as they are, and the plugin chained.
func checkPlaces(confDir, stateDir string) error {
	entries, err := conflist.Entries(confDir, pluginName)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: is --cni-conf-dir where this node's runtime reads its network configurations?", err)
	}
	if err != nil {
		return err
	}
	if len(entries) == 0 {
		for _, dir := range places.Known {
			if networks, _ := conflist.Chained(dir, pluginName); filepath.Clean(dir) != filepath.Clean(confDir) && len(networks) > 0 {
				return fmt.Errorf("the plugin is not chained in %s, but in %s: give --cni-conf-dir and --cni-bin-dir", confDir, dir)
			}
		}
	}
	others := ""
	for _, text := range entries {
		var entry struct {
			StateDir string `json:"stateDir"`
		}
		if json.Unmarshal(text, &entry) != nil {
			continue // an ADD fails by it
		}
		its := filepath.Clean(cmp.Or(entry.StateDir, netconf.DefaultStateDir))
		if its == filepath.Clean(stateDir) {
			return nil
		}
		others = its
	}
	if others != "" {
		return fmt.Errorf("the entry's stateDir is %s: give --state-dir the same, or rules and records stay", others)
	}
	return nil
}
