// Command kube2iam-agent installs the CNI plugin kube2iam-cni on a node, and maintains its rules,
// its records and its entry in the network configuration.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"
)

// The build sets these by -ldflags "-X main.version=…".
var (
	version = "unknown"
	commit  = "unknown"
	date    = "unknown"
)

// pluginName is the file name of the plugin's binary and the type of its entry.
const pluginName = "kube2iam-cni"

func main() { os.Exit(run(os.Args)) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := program().RunContext(ctx, args); err != nil {
		fmt.Fprintf(os.Stderr, "kube2iam-agent: %v\n", err)
		return 1
	}
	return 0
}

func program() *cli.App {
	cli.VersionPrinter = func(c *cli.Context) {
		fmt.Fprintf(c.App.Writer, "kube2iam-agent %s (commit %s, built %s)\n", version, commit, date)
	}
	commands := []*cli.Command{runCommand, installCommand, uninstallCommand, readyCommand}
	for _, command := range commands {
		command.Before = noArguments
	}
	return &cli.App{
		Name:            "kube2iam-agent",
		Usage:           "installs the CNI plugin kube2iam-cni on a node and maintains it",
		UsageText:       "kube2iam-agent run|install|uninstall|ready [options]",
		Version:         version,
		HideHelpCommand: true,
		Commands:        commands,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("unknown command %q; see kube2iam-agent --help", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
}

// noArguments returns an error if a command has arguments.
func noArguments(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("%s: unexpected argument %q", c.Command.Name, c.Args().First())
	}
	return nil
}

func newLog(c *cli.Context) *slog.Logger { return slog.New(slog.NewTextHandler(c.App.ErrWriter, nil)) }
