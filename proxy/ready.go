package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
)

// readyCommand is the startup probe: `kube2iam-proxy ready`. A probe of the admin port cannot tell two proxies apart that are on the same
// host network, and the old one's answer would have the kubelet end it before the new one has taken over.
func readyCommand(stdout io.Writer) *cli.Command {
	return &cli.Command{
		Name:        "ready",
		Usage:       "tell whether the proxy of this container serves the node's pods: it has taken over from the one before",
		Description: "It ends with 0 where it does, and with 1 otherwise.",
		Flags:       []cli.Flag{&cli.StringFlag{Name: "state-dir", Value: defaultStateDir, Usage: "the proxy's --state-dir"}},
		Action: func(c *cli.Context) error {
			here, err := handover.IsHere(c.Context, handoverSocket(c.String("state-dir")))
			if err != nil {
				return err
			}
			if !here {
				return errors.New("no proxy of this container serves yet")
			}
			fmt.Fprintln(stdout, "ready")
			return nil
		},
	}
}
