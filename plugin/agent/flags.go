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
var nodeFlags = []cli.Flag{
	&cli.StringFlag{Name: "cni-conf-dir", DefaultText: "what the container runtime's configuration says, or " + cnidirs.Default.ConfDir,
		Usage: "directory of the network configurations"},
	&cli.StringFlag{Name: "cni-bin-dir", DefaultText: "what the container runtime's configuration says, or " + cnidirs.Default.BinDir,
		Usage: "directory of the CNI plugins' binaries"},
	&cli.StringFlag{Name: "cni-cache-dir", Value: "/var/lib/cni", Usage: "directory of the container runtime's cache of attachments"},
	&cli.StringFlag{Name: "host-root", Usage: "the host's root directory, if it is not /; all other paths except --plugin are below it"},
}

var (
	uninstallFlags = slices.Concat(entryFlags(), nodeFlags)
	installFlags   = slices.Concat(uninstallFlags, []cli.Flag{
		&cli.StringFlag{Name: "plugin", DefaultText: pluginName + " in the directory of this program", Usage: "the plugin's binary to install"},
	})
	// agentFlags are those of run. ready compares them with the flags of the running agent.
	agentFlags = slices.Concat(installFlags, []cli.Flag{
		&cli.BoolFlag{Name: "install", Usage: "install the plugin and its entry, and keep them installed"},
		&cli.StringSliceFlag{Name: "netns-dir", Value: cli.NewStringSlice("/run/netns", "/run/docker/netns"), Usage: "directory of the container runtime's network namespaces; repeatable"},
		&cli.DurationFlag{Name: "interval", Value: 10 * time.Second, Usage: "time between two rounds if the kernel reports no change"},
	})
	onceFlag = &cli.BoolFlag{Name: "once", Usage: "make one round and exit; fails while another agent runs"}
)

// parseEntry returns the entry with the keys that a flag or the environment sets, and its values as
// the plugin parses them.
func parseEntry(c *cli.Context) (entry []byte, conf *netconf.Config, err error) {
	keys := map[string]any{"type": pluginName}
	for _, k := range netconf.Keys {
		if c.IsSet(k.Flag) {
			keys[k.Name] = c.Value(k.Flag)
		}
	}
	if entry, err = json.Marshal(keys); err != nil {
		return nil, nil, err
	}
	conf, err = netconf.Parse(entry)
	return entry, conf, err
}

// changeRoot makes the host's root directory that of this process: the node's iptables finds its
// libraries, and each path is the one that the plugin uses.
func changeRoot(c *cli.Context) error {
	root := c.String("host-root")
	if root == "" {
		return nil
	}
	if err := errors.Join(syscall.Chroot(root), os.Chdir("/")); err != nil {
		return fmt.Errorf("--host-root %s: %w", root, err)
	}
	return nil
}
