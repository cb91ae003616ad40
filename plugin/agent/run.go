package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

func runCommand(stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "run the agent: install, guard, adopt, repair and collect",
		Description: `The agent runs on every node, as root with NET_ADMIN and the host's network (in a container also with SYS_ADMIN
and SYS_CHROOT, the host's root mounted, and --host-root).

It adds the guard, adopts pods that are older than the plugin, repairs missing rules, and collects attachments
whose pod is gone without a DEL. With --install it first installs the plugin and its entry in the network
configuration, and does so again when the primary CNI writes its configuration. Without --install it warns while
the entry is missing, and is not ready. It removes nothing when it stops.

One agent works on a node. Another one, whatever its flags, waits until the first has ended.

Without --install, give it the values that the plugin's entry has; the defaults are the same.`,
		Flags: append(agentFlags(), &cli.BoolFlag{Name: "once", Usage: "make one round and exit; fails while another agent runs"}),
		Action: func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, os.Interrupt)
			defer stop()
			return runAgent(ctx, c, slog.New(slog.NewTextHandler(stderr, nil)))
		},
	}
}

func runAgent(ctx context.Context, c *cli.Context, log *slog.Logger) error {
	conf, err := parseEntry(c)
	if err != nil {
		return err
	}
	interval := c.Duration("interval")
	if interval < time.Second {
		return fmt.Errorf("--interval %s: less than 1s", interval)
	}
	installer := &conflist.Installer{WatchOnly: true, Binary: conflist.Binary{Name: pluginName}, Interval: interval, Log: log}
	if c.Bool("install") {
		var closePlugin func() error
		if installer, closePlugin, err = newInstaller(c, log); err != nil {
			return err
		}
		defer closePlugin()
	}
	if err := changeRoot(c.String("host-root")); err != nil {
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
	dirs := findDirsOrDefault(c, log)
	installer.ConfDir, installer.BinDir = dirs.ConfDir, dirs.BinDir
	config := agent.Config{Settings: attach.SettingsOf(conf), Cache: newCache(c, dirs.ConfDir), Interval: interval}
	if c.Bool("once") {
		a := agent.New(config, agent.Host(), log)
		defer a.Close()
		return a.Round(ctx)
	}
	guarded := make(chan struct{})
	announce := sync.OnceFunc(func() {
		close(guarded)
		notifySystemd(log, daemon.SdNotifyReady+"\nSTATUS=")
	})
	status := newAgentStatus(lock, conf.Guard, installer)
	config.OnRepaired = func(err error) {
		status.setRules(err)
		if err == nil {
			announce()
		}
	}
	a := agent.New(config, agent.Host(), log)
	defer a.Close()
	failed := true
	installer.Installed = func(err error) {
		if failed && err == nil {
			a.Trigger() // pods of the network can be adopted now
		}
		failed = err != nil
		status.setEntry(err)
	}
	log.Info("started", "version", version, "state dir", conf.StateDir, "backend", c.String("backend"), "guard", conf.Guard, "install", !installer.WatchOnly,
		"runtime", dirs.Runtime, "conf dir", dirs.ConfDir, "bin dir", dirs.BinDir)
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.Go(func() error { return a.Run(ctx) })
	tasks.Go(func() error { return watchDirs(ctx, c, dirs, interval) })
	tasks.Go(func() error { return status.watchLock(ctx) })
	tasks.Go(func() error {
		// On a node that cannot be guarded, each ADD fails, so the entry would only keep pods from starting.
		select {
		case <-guarded:
			return installer.Run(ctx)
		case <-ctx.Done():
			return nil
		}
	})
	err = tasks.Wait()
	log.Info("stopped; everything stays as it is")
	return err
}

// lockAgent takes the node's agent lock. It waits until another agent ends, except with --once, where
// another agent is an error.
func lockAgent(ctx context.Context, c *cli.Context, log *slog.Logger, stateDir string) (*agent.Lock, error) {
	info, err := agent.NewInfo(os.Args, flagValues(c), stateDir)
	if err != nil {
		return nil, err
	}
	if c.Bool("once") {
		return agent.TryLock(ctx, info)
	}
	return agent.WaitForLock(ctx, info, func(holder agent.Info) {
		log.Warn("another agent works on this node: waiting until it ends, and changing nothing", "holder", holder.String())
		notifySystemd(log, "STATUS=waiting for another agent: "+holder.String())
	})
}

// notifySystemd sends a state to systemd if systemd started this process.
func notifySystemd(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("cannot notify systemd", "error", err)
	}
}

// newCache returns the container runtime's cache of attachments.
func newCache(c *cli.Context, confDir string) agent.Cache {
	return agent.Cache{
		Dir: c.String("cni-cache-dir"), NetnsDirs: c.StringSlice("netns-dir"),
		ParsePod:  netconf.ParsePod,
		Chained:   func() ([]string, error) { return conflist.Chained(confDir, pluginName) },
		HasPlugin: func(config []byte) bool { return conflist.Has(config, pluginName) },
	}
}
