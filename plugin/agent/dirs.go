package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/cnidirs"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// findDirs returns the CNI directories that the flags set, and otherwise those of the container
// runtime's configuration. With an error, it returns the defaults. Call it after changeRoot.
func findDirs(c *cli.Context) (cnidirs.Dirs, error) {
	flags := cnidirs.Dirs{ConfDir: c.String("cni-conf-dir"), BinDir: c.String("cni-bin-dir")}
	if flags.ConfDir != "" && flags.BinDir != "" {
		return flags, nil
	}
	dirs, err := cnidirs.Find("/")
	dirs.ConfDir, dirs.BinDir = cmp.Or(flags.ConfDir, dirs.ConfDir), cmp.Or(flags.BinDir, dirs.BinDir)
	return dirs, err
}

// findDirsOrDefault is findDirs with a warning instead of an error.
func findDirsOrDefault(c *cli.Context, log *slog.Logger) cnidirs.Dirs {
	dirs, err := findDirs(c)
	if err != nil {
		log.Warn("the container runtime's configuration cannot be read; using the default directories", "error", err)
	}
	return dirs
}

// watchDirs returns an error when the container runtime has other directories than before, as after
// an upgrade. It returns nil when ctx ends.
func watchDirs(ctx context.Context, c *cli.Context, before cnidirs.Dirs) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(c.Duration("interval")):
		}
		// Runtime is empty while the runtime restarts, because its socket does not exist.
		now, err := findDirs(c)
		if err == nil && now.Runtime != "" && (now.ConfDir != before.ConfDir || now.BinDir != before.BinDir) {
			return fmt.Errorf("the container runtime uses other directories than before, %s and %s: exiting, to be restarted with them", now.ConfDir, now.BinDir)
		}
	}
}

// checkDirs returns an error if the plugin was installed with other directories: uninstall would
// leave it chained.
func checkDirs(confDir, stateDir string) error {
	if _, err := os.Stat(confDir); err != nil {
		return fmt.Errorf("%w: is --cni-conf-dir where this node's runtime reads its network configurations?", err)
	}
	entries, err := conflist.Entries(confDir, pluginName)
	if err != nil {
		return err
	}
	if len(entries) == 0 {
		for _, dir := range cnidirs.ConfDirs {
			if networks, _ := conflist.Chained(dir, pluginName); len(networks) > 0 {
				return fmt.Errorf("the plugin is not chained in %s, but in %s: give --cni-conf-dir and --cni-bin-dir", confDir, dir)
			}
		}
		return nil
	}
	var stateDirs []string
	for _, entry := range entries {
		stateDirs = append(stateDirs, netconf.StateDir(entry))
	}
	if !slices.Contains(stateDirs, stateDir) {
		return fmt.Errorf("the entry's stateDir is %s: give --state-dir the same, or rules and records stay", stateDirs[0])
	}
	return nil
}
