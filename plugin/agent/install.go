package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

func installCommand(stdout, stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name:  "install",
		Usage: "install the plugin and its entry on this node, once",
		Description: `It copies the plugin into the runtime's plugin directory, and then appends the entry to the plugins of the
network configuration that the runtime uses: the first valid one of the directory. From then on the runtime
calls the plugin for each new pod.

"run --install" does the same, and repeats it when the primary CNI writes its configuration again.`,
		Flags: slices.Concat(entryFlags(), nodeFlags(), installFlags()),
		Action: func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			return install(c, stdout, slog.New(slog.NewTextHandler(stderr, nil)))
		},
	}
}

// unsettledTimeout is how long install waits for a file that is being written.
const unsettledTimeout = 10 * time.Second

func install(c *cli.Context, stdout io.Writer, log *slog.Logger) error {
	if _, err := parseEntry(c); err != nil {
		return err
	}
	installer, closePlugin, err := newInstaller(c, log)
	if err != nil {
		return err
	}
	defer closePlugin()
	if err := changeRoot(c.String("host-root")); err != nil {
		return err
	}
	dirs := findDirsOrDefault(c, log)
	installer.ConfDir, installer.BinDir = dirs.ConfDir, dirs.BinDir
	changes, err := installer.Install()
	for end := time.Now().Add(unsettledTimeout); errors.Is(err, conflist.ErrUnsettled) && time.Now().Before(end); {
		time.Sleep(100 * time.Millisecond)
		var more []string
		more, err = installer.Install()
		changes = append(changes, more...)
	}
	for _, change := range changes {
		fmt.Fprintln(stdout, change)
	}
	if errors.Is(err, conflist.ErrNoNetwork) {
		return fmt.Errorf("install: %w: the primary CNI has to be installed first", err)
	}
	if err == nil && len(changes) == 0 {
		fmt.Fprintln(stdout, "nothing to do")
	}
	return err
}

// newInstaller returns an installer without its directories. It opens the plugin's binary, because its
// path is not below the host's root directory.
func newInstaller(c *cli.Context, log *slog.Logger) (installer *conflist.Installer, closePlugin func() error, err error) {
	entry, err := entryText(c)
	if err != nil {
		return nil, nil, err
	}
	path := c.String("plugin")
	if path == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, nil, err
		}
		path = filepath.Join(filepath.Dir(self), pluginName)
	}
	plugin, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("the plugin to install: %w", err)
	}
	info, err := plugin.Stat()
	if err != nil {
		plugin.Close()
		return nil, nil, err
	}
	return &conflist.Installer{
		Entry: entry, Interval: c.Duration("interval"), Log: log,
		Binary: conflist.Binary{Name: pluginName, Source: plugin, Size: info.Size()},
	}, plugin.Close, nil
}
