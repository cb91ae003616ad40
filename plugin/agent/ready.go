package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
)

// readyCommand is the agent's readiness probe: `kube2iam-agent ready`.
func readyCommand(stdout io.Writer) *cli.Command {
	return &cli.Command{
		Name:  "ready",
		Usage: "tell whether the agent of this node is ready, which one it is, and what it has checked",
		Description: `It asks the agent that has the node's lock, wherever its state directory is, and ends with 0 where that is
ready, and with 1 otherwise.

Without flags it asks whichever agent runs. With the flags of an agent it asks for that one, and fails where
another has the lock; so it does with --host-root where the other runs in another container.`,
		Flags: agentFlags(),
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("ready: unexpected argument %q", c.Args().First())
			}
			if err := enter(c.String("host-root")); err != nil {
				return err
			}
			agent, err := node.ReadAgentInfo()
			if errors.Is(err, node.ErrNoAgent) {
				return fmt.Errorf("not ready: %w", err)
			}
			if err != nil {
				return err
			}
			if err := isAsked(c, agent); err != nil {
				return fmt.Errorf("not ready: %w", err)
			}
			if !agent.Ready {
				return fmt.Errorf("not ready: %s: %s", agent, agent.Status)
			}
			fmt.Fprintf(stdout, "ready: %s: %s\n", agent, agent.Status)
			return nil
		},
	}
}

// isAsked returns an error where the agent that has the lock is not the one that the flags ask for.
func isAsked(c *cli.Context, agent node.AgentInfo) error {
	if c.String("host-root") != "" {
		mounts, err := node.MountNS()
		if err != nil {
			return err
		}
		if mounts != agent.MountNS {
			return fmt.Errorf("the agent of this container waits for another one to end: %s", agent)
		}
	}
	asked := flagValues(c)
	var differ []string
	given := false
	for name, value := range asked {
		if name == "host-root" {
			continue // it only says how the same directories are reached
		}
		given = given || c.IsSet(name)
		if theirs := agent.Flags[name]; theirs != value {
			differ = append(differ, fmt.Sprintf("--%s %q instead of %q", name, theirs, value))
		}
	}
	if !given || len(differ) == 0 {
		return nil
	}
	slices.Sort(differ)
	return fmt.Errorf("the agent of this node was started with %s: %s", node.Printable(strings.Join(differ, ", ")), agent)
}

// flagValues are the values of the command's flags that agentFlags has, by their names.
func flagValues(c *cli.Context) map[string]string {
	values := make(map[string]string)
	for _, flag := range agentFlags() {
		name := flag.Names()[0]
		if list, ok := c.Value(name).(cli.StringSlice); ok {
			values[name] = strings.Join(list.Value(), ",")
		} else {
			values[name] = fmt.Sprint(c.Value(name))
		}
	}
	return values
}
