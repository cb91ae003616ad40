package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
)

var readyCommand = &cli.Command{
	Name:  "ready",
	Usage: "report whether the agent of this node is ready, which one it is, and what it has checked",
	Description: `It exits with 0 if the agent that has the node's lock is ready, and with 1 otherwise. With flags of an agent it
fails if that agent was started with others. With --host-root it fails if it runs in another container.`,
	Flags: agentFlags,
	Action: func(c *cli.Context) error {
		if err := changeRoot(c); err != nil {
			return err
		}
		holder, err := agent.ReadInfo()
		if err == nil {
			err = checkAgent(c, holder)
		}
		if err == nil && !holder.IsReady {
			err = errors.New(holder.String() + ": " + holder.Status)
		}
		if err != nil {
			return fmt.Errorf("not ready: %w", err)
		}
		fmt.Fprintf(c.App.Writer, "ready: %s: %s\n", holder, holder.Status)
		return nil
	},
}

// checkAgent returns an error if the agent with the lock is not the one that the flags ask for.
func checkAgent(c *cli.Context, holder agent.Info) error {
	flags := c.NumFlags() // of the command line only: the DaemonSet's probe has the agent's environment
	if c.String("host-root") != "" {
		flags--
		mounts, err := agent.MountNS()
		if err != nil {
			return err
		}
		if mounts != holder.MountNS {
			return fmt.Errorf("the agent of this container waits for another one to end: %s", holder)
		}
	}
	var differences []string
	for name, want := range flagValues(c) {
		if name == "host-root" {
			continue // agents with different values can have the same directories
		}
		if got := holder.Flags[name]; got != want {
			differences = append(differences, fmt.Sprintf("--%s %q instead of %q", name, got, want))
		}
	}
	if flags == 0 || len(differences) == 0 {
		return nil
	}
	slices.Sort(differences)
	return fmt.Errorf("the agent of this node was started with %s: %s", agent.Printable(strings.Join(differences, ", ")), holder)
}

// flagValues returns the values of the agent's flags by name.
func flagValues(c *cli.Context) map[string]string {
	values := make(map[string]string)
	for _, flag := range agentFlags {
		name := flag.Names()[0]
		if list, ok := c.Value(name).(cli.StringSlice); ok {
			values[name] = strings.Join(list.Value(), ",")
		} else {
			values[name] = fmt.Sprint(c.Value(name))
		}
	}
	return values
}
