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

// installCommand puts the plugin in place once: `kube2iam-agent install`.
func installCommand(stdout, stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name:  "install",
		Usage: "put the program and its entry in place on this node, once",
		Description: `It copies the plugin into the runtime's plugin directory, and then appends the entry to the plugins of the
network configuration that the runtime uses: the first of the directory that makes sense. From the next pod on
the plugin is called.

The agent does the same with --install, and again whenever the primary CNI writes its configuration anew.`,
		Flags: slices.Concat(entryFlags(), nodeFlags(), installFlags()),
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("install: unexpected argument %q", c.Args().First())
			}
			if _, err := agentConf(c); err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(stderr, nil))
			install, program, err := installer(c, log)
			if err != nil {
				return err
			}
			defer program.Close()
			if err := enter(c.String("host-root")); err != nil {
				return err
			}
			where := findPlaces(c, log)
			install.ConfDir, install.BinDir = where.Configurations, where.Programs
			did, err := install.Install()
			// What is being written, or makes no sense, is known to be the one or the other soon.
			for end := time.Now().Add(settling); errors.Is(err, conflist.ErrUnsettled) && time.Now().Before(end); {
				time.Sleep(100 * time.Millisecond)
				var more []string
				more, err = install.Install()
				did = append(did, more...)
			}
			for _, line := range did {
				fmt.Fprintln(stdout, line)
			}
			if errors.Is(err, conflist.ErrNoNetwork) {
				return fmt.Errorf("install: %w: the primary CNI has to be installed first", err)
			}
			if err == nil && len(did) == 0 {
				fmt.Fprintln(stdout, "nothing to do")
			}
			return err
		},
	}
}

// settling is how long install waits for a file that is being written.
const settling = 10 * time.Second

// installer returns an installer as the flags say, without its directories, and the plugin's binary,
// which is opened here because its path is not below the host's root directory.
func installer(c *cli.Context, log *slog.Logger) (*conflist.Installer, *os.File, error) {
	text, err := entryText(c)
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
	program, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("the plugin to install: %w", err)
	}
	info, err := program.Stat()
	if err != nil {
		program.Close()
		return nil, nil, err
	}
	interval := c.Duration("interval")
	return &conflist.Installer{
		Entry: text, Interval: interval, Log: log,
		Binary: conflist.Binary{Name: pluginName, Source: program, Size: info.Size()},
	}, program, nil
}
