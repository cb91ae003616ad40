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

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
)

// uninstallCommand takes the plugin off a node: `kube2iam-cni uninstall`.
func uninstallCommand(stdout, stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name:  "uninstall",
		Usage: "take entry, rules and state off this node",
		Description: `Stop the agent first: it would put everything back. Then this takes the entry out of every network configuration,
removes all rules and the guard, and the state directory. Pods can be made and deleted throughout.

FROM THEN ON PODS REACH THE NODE'S OWN CREDENTIALS. A proxy that still runs serves nobody any more.

The program itself stays while pods run that were attached through it, for their DELs; call this again to have it
removed once they are gone.`,
		Flags: slices.Concat(entryFlags(), nodeFlags(), installFlags()),
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
	end, err := node.Absence(ctx, conf.StateDir)
	if err != nil {
		return err
	}
	defer end()
	did, err := conflist.Unchain(c.String("cni-conf-dir"), name)
	for _, line := range did {
		fmt.Fprintln(stdout, line)
	}
	if err != nil {
		return fmt.Errorf("uninstall: the rules stay, for the plugin may still be called: %w", err)
	}
	n := node.New(settings(conf), node.Host(), log)
	defer n.Close()
	attachments, err := n.Uninstall(ctx)
	if err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	fmt.Fprintf(stdout, "rules and state of %d attachments removed\n", attachments)
	cached, err := cache(c).Through()
	if err != nil {
		return fmt.Errorf("uninstall: the program stays: %w", err)
	}
	program := filepath.Join(c.String("cni-bin-dir"), name)
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
