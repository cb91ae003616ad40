package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

var runCommand = &cli.Command{
	Name:  "run",
	Usage: "run the agent: install, guard, adopt, repair and collect",
	Description: `It repairs the guard and the rules, adopts pods that are older than the plugin, and collects attachments whose pod
is gone. With --install it also keeps the plugin and its entry installed. It removes nothing when it stops.

Without --install, give it the values that the plugin's entry has; the defaults are the same. A second agent on a
node, whatever its flags, waits until the first has ended.`,
	Flags:  append(slices.Clone(agentFlags), onceFlag),
	Action: runAgent,
}

func runAgent(c *cli.Context) error {
	entry, conf, err := parseEntry(c)
	if err != nil {
		return err
	}
	interval := c.Duration("interval")
	if interval < time.Second {
		return fmt.Errorf("--interval %s: less than 1s", interval)
	}
	ctx, log := c.Context, newLog(c)
	installer := &conflist.Installer{WatchOnly: true, Binary: conflist.Binary{Name: pluginName}, Interval: interval, Log: log}
	if c.Bool("install") {
		if installer, err = newInstaller(c, entry, log); err != nil {
			return err
		}
	}
	if err := changeRoot(c); err != nil {
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
	chained := config.Cache.Chained
	config.Cache.Chained = func() ([]string, error) {
		networks, err := chained()
		// Another program may have removed the entry. Pods that start without it are adopted.
		if network := installer.Network(); network != "" && !slices.Contains(networks, network) {
			networks = append(networks, network)
		}
		return networks, err
	}
	if c.Bool("once") {
		a := agent.New(config, agent.Host(), log)
		defer a.Close()
		return a.Round(ctx)
	}
	tasks, ctx := errgroup.WithContext(ctx)
	status := newAgentStatus(lock, conf.Guard, installer, func(err error) { tasks.Go(func() error { return err }) })
	guarded := make(chan struct{})
	announce := sync.OnceFunc(func() {
		close(guarded)
		notifySystemd(log, daemon.SdNotifyReady+"\nSTATUS=")
	})
	config.OnRepaired = func(err error) {
		status.set(&status.rules, err)
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
		status.set(&status.entry, err)
	}
	log.Info("started", "version", version, "state dir", conf.StateDir, "backend", c.String("backend"), "guard", conf.Guard, "install", !installer.WatchOnly,
		"runtime", dirs.Runtime, "conf dir", dirs.ConfDir, "bin dir", dirs.BinDir)
	tasks.Go(func() error { return a.Run(ctx) })
	tasks.Go(func() error { return watchDirs(ctx, c, dirs) })
	tasks.Go(func() error {
		// On a node that cannot be guarded, each ADD fails, so the entry would only keep pods from
		// starting.
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

// lockAgent takes the node's agent lock. It waits until another agent ends, except with --once,
// where another agent is an error.
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
