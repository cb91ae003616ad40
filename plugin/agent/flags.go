package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/cnidirs"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// entryFlags are the keys of the plugin's entry in the network configuration.
func entryFlags() []cli.Flag {
	var flags []cli.Flag
	for _, k := range netconf.Keys {
		switch value := k.Default.(type) {
		case string:
			flags = append(flags, &cli.StringFlag{Name: k.Flag, Value: value, EnvVars: []string{k.Env()}, Usage: k.Usage})
		case int:
			flags = append(flags, &cli.IntFlag{Name: k.Flag, Value: value, EnvVars: []string{k.Env()}, Usage: k.Usage})
		case bool:
			flags = append(flags, &cli.BoolFlag{Name: k.Flag, Value: value, EnvVars: []string{k.Env()}, Usage: k.Usage})
		}
	}
	return flags
}

// nodeFlags are the directories of the node.
func nodeFlags() []cli.Flag {
	const runtimes = "what the container runtime's configuration says, or "
	return []cli.Flag{
		&cli.StringFlag{Name: "cni-conf-dir", DefaultText: runtimes + cnidirs.Default.ConfDir,
			Usage: "directory of the network configurations"},
		&cli.StringFlag{Name: "cni-bin-dir", DefaultText: runtimes + cnidirs.Default.BinDir,
			Usage: "directory of the CNI plugins' binaries"},
		&cli.StringFlag{Name: "cni-cache-dir", Value: "/var/lib/cni", Usage: "directory of the container runtime's cache of attachments"},
		&cli.StringFlag{Name: "host-root", Usage: "the host's root directory, if it is not /; all other paths except --plugin are below it"},
	}
}

// installFlags are those of the commands that install the plugin.
func installFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "plugin", DefaultText: pluginName + " in the directory of this program", Usage: "the plugin's binary to install"},
	}
}

// agentFlags are those of run. ready compares them with the flags of the running agent.
func agentFlags() []cli.Flag {
	return slices.Concat(entryFlags(), nodeFlags(), installFlags(), []cli.Flag{
		&cli.BoolFlag{Name: "install", Usage: "install the plugin and its entry, and keep them installed"},
		&cli.StringSliceFlag{Name: "netns-dir", Value: cli.NewStringSlice("/run/netns", "/run/docker/netns"), Usage: "directory of the container runtime's network namespaces; repeatable"},
		&cli.DurationFlag{Name: "interval", Value: 10 * time.Second, Usage: "time between two rounds if the kernel reports no change"},
	})
}

// noArguments returns an error if a command has arguments.
func noArguments(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("%s: unexpected argument %q", c.Command.Name, c.Args().First())
	}
	return nil
}

// entryText returns the entry as the agent writes it, with the keys that a flag or the environment
// sets.
func entryText(c *cli.Context) ([]byte, error) {
	text := fmt.Appendf(nil, `{"type": %q`, pluginName)
	for _, k := range netconf.Keys {
		if !c.IsSet(k.Flag) {
			continue
		}
		value, err := json.Marshal(c.Value(k.Flag))
		if err != nil {
			return nil, err
		}
		text = fmt.Appendf(text, `, %q: %s`, k.Name, value)
	}
	return append(text, '}'), nil
}

// parseEntry parses the entry as the plugin does.
func parseEntry(c *cli.Context) (*netconf.Config, error) {
	text, err := entryText(c)
	if err != nil {
		return nil, err
	}
	conf, err := netconf.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.Command.Name, err)
	}
	return conf, nil
}

// changeRoot makes the host's root directory that of this process: the node's iptables finds its
// libraries, and each path is the one that the plugin uses.
func changeRoot(root string) error {
	if root == "" {
		return nil
	}
	if err := errors.Join(syscall.Chroot(root), os.Chdir("/")); err != nil {
		return fmt.Errorf("--host-root %s: %w", root, err)
	}
	return nil
}
