package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

var installCommand = &cli.Command{
	Name:  "install",
	Usage: "install the plugin and its entry on this node, once",
	Description: `It copies the plugin into the runtime's plugin directory, and then appends the entry to the plugins of the
network configuration that the runtime uses. "run --install" repeats it when the primary CNI writes that again.`,
	Flags:  installFlags,
	Action: install,
}

// unsettledTimeout is how long install waits for a file that is being written.
const unsettledTimeout = 10 * time.Second

func install(c *cli.Context) error {
	entry, _, err := parseEntry(c)
	if err != nil {
		return err
	}
	log := newLog(c)
	installer, err := newInstaller(c, entry, log)
	if err != nil {
		return err
	}
	if err := changeRoot(c); err != nil {
		return err
	}
	dirs := findDirsOrDefault(c, log)
	installer.ConfDir, installer.BinDir = dirs.ConfDir, dirs.BinDir
	changes, err := installer.Install()
	for end := time.Now().Add(unsettledTimeout); errors.Is(err, conflist.ErrUnsettled) && time.Now().Before(end) && c.Err() == nil; {
		time.Sleep(100 * time.Millisecond)
		var more []string
		more, err = installer.Install()
		changes = append(changes, more...)
	}
	for _, change := range changes {
		fmt.Fprintln(c.App.Writer, change)
	}
	if errors.Is(err, conflist.ErrNoNetwork) {
		return fmt.Errorf("%w: the primary CNI has to be installed first", err)
	}
	if err == nil && len(changes) == 0 {
		fmt.Fprintln(c.App.Writer, "nothing to do")
	}
	return err
}

// newInstaller returns an installer without its directories. It opens the plugin's binary, because
// its path is not below the host's root directory. The file stays open for as long as this process
// runs.
func newInstaller(c *cli.Context, entry []byte, log *slog.Logger) (*conflist.Installer, error) {
	path := c.String("plugin")
	if path == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		path = filepath.Join(filepath.Dir(self), pluginName)
	}
	plugin, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("the plugin to install: %w", err)
	}
	info, err := plugin.Stat()
	if err != nil {
		return nil, err
	}
	return &conflist.Installer{
		Entry: entry, Interval: c.Duration("interval"), Log: log,
		Binary: conflist.Binary{Name: pluginName, Source: plugin, Size: info.Size()},
	}, nil
}
