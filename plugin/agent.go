package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
)

// name is the plugin's, as the type of its entry in a network configuration.
const name = "kube2iam-cni"

// agentCommand is the node's agent: `kube2iam-cni agent`.
func agentCommand(stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name:  "agent",
		Usage: "keep this node as the plugin made it: adopt, repair, collect, guard",
		Description: `It runs on every node, as root with NET_ADMIN and the host's network (in a container: SYS_ADMIN and SYS_CHROOT too,
the host's root mounted, and --host-root).

It puts the guard in place, adopts pods that came before the plugin was chained, makes again what somebody
flushed, and collects what no DEL came for. Stopped, it leaves everything as it is.

Give it the values that the plugin's entry in the network configuration has; their defaults are the same.`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "proxy-ip", Value: "auto", Usage: `the entry's "proxyIP"`},
			&cli.UintFlag{Name: "proxy-port", Value: 8181, Usage: `the entry's "proxyPort"`},
			&cli.StringFlag{Name: "metadata-ip", Value: "169.254.169.254", Usage: `the entry's "metadataIP"`},
			&cli.StringFlag{Name: "state-dir", Value: netconf.DefaultStateDir, Usage: `the entry's "stateDir"`},
			&cli.StringFlag{Name: "backend", Value: string(netconf.Auto), Usage: `the entry's "backend"`},
			&cli.BoolFlag{Name: "guard", Value: true, Usage: `the entry's "guard"; --guard=false for none`},
			&cli.StringFlag{Name: "mark", Value: fmt.Sprintf("%#x", netconf.DefaultMark), Usage: `the entry's "mark"`},
			&cli.StringFlag{Name: "path", Value: string(netconf.AutoPath), Usage: `the entry's "path"`},
			&cli.StringFlag{Name: "cni-cache-dir", Value: "/var/lib/cni", Usage: "where the container runtime keeps what it attached"},
			&cli.StringFlag{Name: "cni-conf-dir", Value: "/etc/cni/net.d", Usage: "where the network configurations are; pods are adopted of those that the plugin is chained in"},
			&cli.StringSliceFlag{Name: "netns-dir", Value: cli.NewStringSlice("/run/netns", "/run/docker/netns"), Usage: "where the container runtime keeps network namespaces; repeatable"},
			&cli.DurationFlag{Name: "interval", Value: 10 * time.Second, Usage: "time between two rounds where the kernel tells of no change"},
			&cli.StringFlag{Name: "host-root", Usage: "the host's root directory, where it is not /; all other paths are below it"},
			&cli.BoolFlag{Name: "once", Usage: "make one round and end"},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("agent: unexpected argument %q", c.Args().First())
			}
			ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, os.Interrupt)
			defer stop()
			return runAgent(ctx, c, slog.New(slog.NewTextHandler(stderr, nil)))
		},
	}
}

func runAgent(ctx context.Context, c *cli.Context, log *slog.Logger) error {
	conf, err := agentConf(c)
	if err != nil {
		return err
	}
	if c.Duration("interval") < time.Second {
		return fmt.Errorf("--interval %s: less than 1s", c.Duration("interval"))
	}
	if root := c.String("host-root"); root != "" {
		// The node's iptables finds its libraries, and every path is what the plugin knows it by.
		if err := errors.Join(syscall.Chroot(root), os.Chdir("/")); err != nil {
			return fmt.Errorf("--host-root %s: %w", root, err)
		}
	}
	agent := node.NewAgent(node.New(settings(conf), node.Host(), log), cache(c), c.Duration("interval"))
	defer agent.Close()
	if c.Bool("once") {
		return agent.Round(ctx)
	}
	if agent.Changes, err = node.Changes(ctx, log); err != nil {
		log.Warn("changes are found by looking only", "interval", agent.Interval, "error", err)
	}
	agent.Ready = func() {
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			log.Warn("systemd was not told that the node is guarded", "error", err)
		}
	}
	log.Info("started", "version", version, "state dir", conf.StateDir, "backend", conf.Backend, "guard", conf.Guard)
	err = agent.Run(ctx)
	log.Info("stopped; everything stays as it is")
	return err
}

// cache is the runtime's, with what it says in terms of the plugin's.
func cache(c *cli.Context) node.Cache {
	return node.Cache{
		Dir: c.String("cni-cache-dir"), NetnsDirs: c.StringSlice("netns-dir"),
		Pod: func(args string) (attachment.Pod, error) {
			pod, err := netconf.ParsePod(args)
			return attachment.Pod(pod), err
		},
		Chained: func() ([]string, error) { return conflist.Chained(c.String("cni-conf-dir"), name) },
		Is:      func(config []byte) bool { return conflist.Has(config, name) },
	}
}

// agentConf reads the flags that say what the plugin's entry says, by the same rules.
func agentConf(c *cli.Context) (*netconf.Config, error) {
	entry := map[string]any{
		"cniVersion": "1.1.0", "name": "agent", "type": name,
		"proxyIP": c.String("proxy-ip"), "proxyPort": c.Uint("proxy-port"), "metadataIP": c.String("metadata-ip"), "stateDir": c.String("state-dir"),
		"backend": c.String("backend"), "guard": c.Bool("guard"), "mark": c.String("mark"), "path": c.String("path"),
	}
	data, err := json.Marshal(entry)
	if err != nil {
		return nil, err
	}
	conf, err := netconf.Parse(data)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	return conf, nil
}
