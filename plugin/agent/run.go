package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
)

// runCommand is the agent itself: `kube2iam-agent run`.
func runCommand(stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "keep this node as the plugin made it: adopt, repair, collect, guard",
		Description: `It runs on every node, as root with NET_ADMIN and the host's network (in a container: SYS_ADMIN and SYS_CHROOT too,
the host's root mounted, and --host-root).

It puts the guard in place, adopts pods that came before the plugin was chained, makes again what somebody
flushed, and collects what no DEL came for. With --install it puts the plugin into the runtime's plugin
directory and its entry into the network configuration first, and again whenever the primary CNI writes its
own anew; without, it warns while the entry is missing, and is not ready. Stopped, it leaves everything as it is.

One agent works on a node. Another one, whatever its flags, waits until that has ended.

Give it the values that the plugin's entry in the network configuration has; their defaults are the same.`,
		Flags: append(agentFlags(), &cli.BoolFlag{Name: "once", Usage: "make one round and end; it fails while an agent runs"}),
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("run: unexpected argument %q", c.Args().First())
			}
			ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, os.Interrupt)
			defer stop()
			return runAgent(ctx, c, slog.New(slog.NewTextHandler(stderr, nil)))
		},
	}
}

// agentFlags are the flags of an agent, by which ready knows it.
func agentFlags() []cli.Flag {
	return slices.Concat(entryFlags(), nodeFlags(), installFlags(), []cli.Flag{
		&cli.BoolFlag{Name: "install", Usage: "install the plugin and its entry too, and keep them installed"},
		&cli.StringSliceFlag{Name: "netns-dir", Value: cli.NewStringSlice("/run/netns", "/run/docker/netns"), Usage: "where the container runtime keeps network namespaces; repeatable"},
		&cli.DurationFlag{Name: "interval", Value: 10 * time.Second, Usage: "time between two rounds where the kernel tells of no change"},
	})
}

func runAgent(ctx context.Context, c *cli.Context, log *slog.Logger) error {
	conf, err := agentConf(c)
	if err != nil {
		return err
	}
	if c.Duration("interval") < time.Second {
		return fmt.Errorf("--interval %s: less than 1s", c.Duration("interval"))
	}
	install := &conflist.Installer{WatchOnly: true, Binary: conflist.Binary{Name: pluginName}, Interval: c.Duration("interval"), Log: log}
	if c.Bool("install") {
		var program *os.File
		if install, program, err = installer(c, log); err != nil {
			return err
		}
		defer program.Close()
	}
	if err := enter(c.String("host-root")); err != nil {
		return err
	}
	lock, err := lockAgent(ctx, c, log, conf.StateDir)
	if err != nil {
		if ctx.Err() != nil {
			log.Info("stopped while waiting; nothing was changed")
			return nil
		}
		return err
	}
	defer lock.Unlock()
	where := findPlaces(c, log)
	install.ConfDir, install.BinDir = where.Configurations, where.Programs
	agent := node.NewAgent(node.New(settings(conf), node.Host(), log), cache(c, where.Configurations), c.Duration("interval"))
	defer agent.Close()
	if c.Bool("once") {
		return agent.Round(ctx)
	}
	changes, err := node.Changes(ctx, log)
	if err != nil {
		log.Warn("changes are found by looking only", "interval", agent.Interval, "error", err)
	}
	look := make(chan struct{}, 1)
	agent.Changes = look
	guarded := make(chan struct{})
	first := sync.OnceFunc(func() {
		close(guarded)
		notify(log, daemon.SdNotifyReady+"\nSTATUS=")
	})
	ready := newReadiness(lock, conf.Guard, install)
	agent.Repaired = func(err error) {
		ready.setRules(err)
		if err == nil {
			first()
		}
	}
	log.Info("started", "version", version, "state dir", conf.StateDir, "backend", c.String("backend"), "guard", conf.Guard, "install", !install.WatchOnly,
		"runtime", where.Runtime, "configurations", where.Configurations, "programs", where.Programs)
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.Go(func() error { return agent.Run(ctx) })
	tasks.Go(func() error { return relay(ctx, changes, look) })
	tasks.Go(func() error { return placesStay(ctx, c, where, agent.Interval) })
	tasks.Go(func() error { return ready.untilLost(ctx) })
	tasks.Go(func() error {
		// Not before the guard stands: where none can be made, an entry would only fail each pod.
		select {
		case <-guarded:
		case <-ctx.Done():
			return nil
		}
		failing := true
		install.Installed = func(err error) {
			if failing && err == nil {
				tell(look) // pods can be adopted now
			}
			failing = err != nil
			ready.setEntry(err)
		}
		return install.Run(ctx)
	})
	err = tasks.Wait()
	log.Info("stopped; everything stays as it is")
	return err
}

// lockAgent takes the node's agent lock. It waits for another agent to end, and says so; with --once
// the other agent's presence is an error.
func lockAgent(ctx context.Context, c *cli.Context, log *slog.Logger, stateDir string) (*node.AgentLock, error) {
	info, err := node.NewAgentInfo(os.Args, flagValues(c), stateDir)
	if err != nil {
		return nil, err
	}
	if c.Bool("once") {
		return node.TryLockAgent(ctx, info)
	}
	return node.LockAgent(ctx, info, func(holder node.AgentInfo) {
		log.Warn("another agent works on this node: waiting until it ends, and changing nothing", "holder", holder.String())
		notify(log, "STATUS=waiting for another agent: "+holder.String())
	})
}

// notify tells systemd, where that started this process.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("systemd was not told of the agent's state", "error", err)
	}
}

// relay passes on that there were changes, until ctx ends.
func relay(ctx context.Context, from <-chan struct{}, to chan<- struct{}) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-from:
			tell(to)
		}
	}
}

// tell sends where nobody has been told yet.
func tell(to chan<- struct{}) {
	select {
	case to <- struct{}{}:
	default:
	}
}

// cache is the runtime's, with what it says in terms of the plugin's.
func cache(c *cli.Context, confDir string) node.Cache {
	return node.Cache{
		Dir: c.String("cni-cache-dir"), NetnsDirs: c.StringSlice("netns-dir"),
		Pod:     netconf.ParsePod,
		Chained: func() ([]string, error) { return conflist.Chained(confDir, pluginName) },
		Is:      func(config []byte) bool { return conflist.Has(config, pluginName) },
	}
}
