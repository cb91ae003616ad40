package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/places"
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

// nodeFlags say where things are on the node.
func nodeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "cni-conf-dir", DefaultText: "what the container runtime's configuration says, or " + places.Default.Configurations,
			Usage: "where the network configurations are; pods are adopted of those that the plugin is chained in"},
		&cli.StringFlag{Name: "cni-cache-dir", Value: "/var/lib/cni", Usage: "where the container runtime keeps what it attached"},
		&cli.StringFlag{Name: "cni-bin-dir", DefaultText: "what the container runtime's configuration says, or " + places.Default.Programs,
			Usage: "where the container runtime finds the plugins' programs"},
		&cli.StringFlag{Name: "host-root", Usage: "the host's root directory, where it is not /; all other paths are below it"},
	}
}

// installFlags say what is installed.
func installFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "plugin", DefaultText: pluginName + " in the directory of this program",
			Usage: "the plugin's binary that is installed, outside --host-root"},
	}
}

// findPlaces is what the flags say, and where they say nothing the container runtime's own configuration. It is for after enter.
func findPlaces(c *cli.Context, log *slog.Logger) places.Places {
	found, err := lookForPlaces(c)
	if err != nil {
		log.Warn("the container runtime's configuration cannot be read: taking the usual places", "error", err)
	}
	return found
}

// lookForPlaces is findPlaces with its error, which comes with the usual places.
func lookForPlaces(c *cli.Context) (places.Places, error) {
	given := places.Places{Configurations: c.String("cni-conf-dir"), Programs: c.String("cni-bin-dir")}
	if given.Configurations != "" && given.Programs != "" {
		return given, nil
	}
	found, err := places.Find("/")
	found.Configurations = cmp.Or(given.Configurations, found.Configurations)
	found.Programs = cmp.Or(given.Programs, found.Programs)
	return found, err
}

// placesStay waits until ctx ends, or the container runtime has other places than it had: an upgraded one may look for programs elsewhere.
func placesStay(ctx context.Context, c *cli.Context, were places.Places, interval time.Duration) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		// While a runtime is started anew its socket is not there.
		if now, err := lookForPlaces(c); err == nil && now.Runtime != "" && (now.Configurations != were.Configurations || now.Programs != were.Programs) {
			return fmt.Errorf("the container runtime has other places than before, %s and %s: ending, to be started anew with them", now.Configurations, now.Programs)
		}
	}
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

// agentConf parses the entry as the plugin does.
func agentConf(c *cli.Context) (*netconf.Config, error) {
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

// enter makes a host's root directory this process's: the node's iptables finds its libraries, and every path is what the plugin
// knows it by.
func enter(root string) error {
	if root == "" {
		return nil
	}
	if err := errors.Join(syscall.Chroot(root), os.Chdir("/")); err != nil {
		return fmt.Errorf("--host-root %s: %w", root, err)
	}
	return nil
}

// settings are those of the rounds.
func settings(c *netconf.Config) node.Settings {
	return node.Settings{
		ProxyIP: c.ProxyIP, ProxyPort: c.ProxyPort, MetadataIP: c.MetadataIP, StateDir: c.StateDir,
		Backend: cmp.Or(string(c.Backend), "auto"), Guard: c.Guard, Mark: c.Mark, InPod: c.Datapath == attachment.DatapathPod,
	}
}
