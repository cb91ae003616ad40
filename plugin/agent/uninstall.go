package main

import (
	"context"
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

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

func uninstallCommand(stdout, stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name:  "uninstall",
		Usage: "remove entry, rules and state from this node",
		Description: `Stop the agent first: it would restore everything. Then this removes the entry from every network configuration,
all rules and the guard, and the state directory. Pods can be created and deleted meanwhile.

FROM THEN ON PODS REACH THE NODE'S OWN CREDENTIALS. A proxy that still runs serves no pod.

The plugin's binary stays while pods exist that were attached through it, because the runtime runs it for their
DELs. Call this again after these pods are gone, to remove the binary.`,
		Flags: slices.Concat(entryFlags(), nodeFlags()),
		Action: func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, os.Interrupt)
			defer stop()
			if err := uninstall(ctx, c, stdout, slog.New(slog.NewTextHandler(stderr, nil))); err != nil {
				return fmt.Errorf("uninstall: %w", err)
			}
			return nil
		},
	}
}

// uninstall removes in the reverse order of install and ADD: first the entry, so that the runtime does
// no longer call the plugin, then rules and state, and then the binary.
func uninstall(ctx context.Context, c *cli.Context, stdout io.Writer, log *slog.Logger) error {
	conf, err := parseEntry(c)
	if err != nil {
		return err
	}
	if err := changeRoot(c.String("host-root")); err != nil {
		return err
	}
	dirs, err := findDirs(c)
	if err != nil {
		return fmt.Errorf("the container runtime's configuration cannot be read: give --cni-conf-dir and --cni-bin-dir: %w", err)
	}
	if err := checkDirs(dirs.ConfDir, conf.StateDir); err != nil {
		return err
	}
	info, err := agent.NewInfo(os.Args, nil, conf.StateDir)
	if err != nil {
		return err
	}
	info.Status = "the plugin is being uninstalled"
	lock, err := agent.TryLock(ctx, info) // keeps an agent from starting
	if errors.Is(err, agent.ErrRunning) {
		return fmt.Errorf("an agent would put everything back: stop it first (delete its DaemonSet, or stop its unit): %w", err)
	}
	if err != nil {
		return err
	}
	defer lock.Unlock()
	changes, err := conflist.Unchain(dirs.ConfDir, pluginName)
	for _, change := range changes {
		fmt.Fprintln(stdout, change)
	}
	if err != nil {
		return fmt.Errorf("the rules stay, for the plugin may still be called: %w", err)
	}
	attachments, err := removeRules(ctx, attach.New(attach.SettingsOf(conf), attach.Host(), log))
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "rules and state of %d attachments removed\n", attachments)
	return removeBinary(newCache(c, dirs.ConfDir), filepath.Join(dirs.BinDir, pluginName), stdout)
}

// removeRules removes rules and state of all attachments, and returns their number. An ADD that began
// before the entry was removed ends within a second, so removeRules repeats twice.
func removeRules(ctx context.Context, n *attach.Node) (attachments int, err error) {
	defer n.Close()
	for attempt := range 3 {
		if attempt > 0 {
			select {
			case <-ctx.Done():
				return attachments, ctx.Err()
			case <-time.After(time.Second):
			}
		}
		removed, err := agent.Uninstall(ctx, n)
		attachments += removed
		if err != nil {
			return attachments, err
		}
	}
	return attachments, nil
}

// removeBinary removes the plugin's binary if no pod exists that was attached through it.
func removeBinary(cache agent.Cache, path string, stdout io.Writer) error {
	pods, err := cache.CountChained()
	if err != nil {
		return fmt.Errorf("the program stays: %w", err)
	}
	if pods > 0 {
		fmt.Fprintf(stdout, "%s stays: %d pods were attached through it; call this again once they are gone\n", path, pods)
		return nil
	}
	if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	fmt.Fprintln(stdout, "program "+path+" removed")
	return nil
}
