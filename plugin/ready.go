package main

import (
	"fmt"
	"io"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
)

// readyCommand is the agent's readiness probe: `kube2iam-cni ready`.
func readyCommand(stdout io.Writer) *cli.Command {
	return &cli.Command{
		Name:        "ready",
		Usage:       "tell whether the agent of this node has the guard and the entry in place",
		Description: "It ends with 0 where an agent runs that does, and with 1 otherwise; the agent's log says why not.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "state-dir", Value: netconf.DefaultStateDir, Usage: `the entry's "stateDir"`},
			&cli.StringFlag{Name: "host-root", Usage: "the host's root directory, where it is not /; the other path is below it"},
		},
		Action: func(c *cli.Context) error {
			ready, err := node.IsReady(filepath.Join(c.String("host-root"), c.String("state-dir")))
			if err != nil {
				return err
			}
			if !ready {
				return fmt.Errorf("no agent is ready on this node")
			}
			fmt.Fprintln(stdout, "ready")
			return nil
		},
	}
}
