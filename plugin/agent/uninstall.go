package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

var uninstallCommand = &cli.Command{
	Name:  "uninstall",
	Usage: "remove entry, rules and state from this node",
	Description: `Stop the agent first. FROM THEN ON PODS REACH THE NODE'S OWN CREDENTIALS.

The plugin's binary stays while pods exist that were attached through it, because the runtime runs it for their
DELs. Call this again after these pods are gone, to remove the binary.`,
	Flags:  uninstallFlags,
	Action: uninstall,
}

// uninstall removes in the reverse order of install and ADD: first the entry, so that the runtime
// does no longer call the plugin, then rules and state, and then the binary.
func uninstall(c *cli.Context) error {
	_, conf, err := parseEntry(c)
	if err != nil {
		return err
	}
	if err := changeRoot(c); err != nil {
		return err
	}
	dirs, err := findDirs(c)
	if err != nil {
		return fmt.Errorf("the container runtime's configuration cannot be read: give --cni-conf-dir and --cni-bin-dir: %w", err)
	}
	if err := checkDirs(dirs.ConfDir, conf.StateDir); err != nil {
		return err
	}
	info, err := agent.NewInfo(os.Args, nil, conf.StateDir)
	if err != nil {
		return err
	}
	info.Status = "the plugin is being uninstalled"
	lock, err := agent.TryLock(c.Context, info) // keeps an agent from starting
	if errors.Is(err, agent.ErrRunning) {
		return fmt.Errorf("an agent would put everything back: stop it first (delete its DaemonSet, or stop its unit): %w", err)
	}
	if err != nil {
		return err
	}
	defer lock.Unlock()
	changes, err := conflist.Unchain(dirs.ConfDir, pluginName)
	for _, change := range changes {
		fmt.Fprintln(c.App.Writer, change)
	}
	if err != nil {
		return fmt.Errorf("the rules stay, for the plugin may still be called: %w", err)
	}
	n := attach.New(attach.SettingsOf(conf), attach.Host(), newLog(c))
	defer n.Close()
	attachments, err := agent.Uninstall(c.Context, n)
	if err != nil {
		return err
	}
	// An ADD that began before the entry was removed ends within two seconds.
	select {
	case <-c.Done():
		return c.Err()
	case <-time.After(2 * time.Second):
	}
	late, err := agent.Uninstall(c.Context, n)
	if err != nil {
		return err
	}
	if err := agent.RemoveUplinks(); err != nil {
		return err
	}
	fmt.Fprintf(c.App.Writer, "rules and state of %d attachments removed\n", attachments+late)
	return removeBinary(newCache(c, dirs.ConfDir), filepath.Join(dirs.BinDir, pluginName), c.App.Writer)
}

// removeBinary removes the plugin's binary if no pod exists that was attached through it.
func removeBinary(cache agent.Cache, path string, stdout io.Writer) error {
	pods, err := cache.CountChained()
	if err != nil {
		return fmt.Errorf("the program stays: %w", err)
	}
	if pods > 0 {
		fmt.Fprintf(stdout, "%s stays: %d pods were attached through it; call this again once they are gone\n", path, pods)
		return nil
	}
	err = os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		fmt.Fprintln(stdout, "program "+path+" removed")
	}
	return err
}
