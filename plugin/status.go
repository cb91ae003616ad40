package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// status fails with code 50 if every ADD would fail: without the backend that the configuration
// names, without an address for the proxy, or without a writable state directory. It changes
// nothing.
func (p *plugin) status(args *skel.CmdArgs) error {
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	unavailable := func(err error) error { return cniError(types.ErrPluginNotAvailable, "", "%v", err) }
	n := p.node(conf)
	defer n.Close()
	if err := n.CheckUsable(context.Background()); err != nil {
		return unavailable(err)
	}
	if err := writable(conf.StateDir); err != nil {
		return unavailable(fmt.Errorf("stateDir: %w", err))
	}
	return nil
}

// writable returns an error if the directory exists and is not writable, or cannot be created.
func writable(dir string) error {
	for {
		err := unix.Access(dir, unix.W_OK|unix.X_OK)
		if errors.Is(err, fs.ErrNotExist) && dir != "/" {
			dir = filepath.Dir(dir)
			continue
		}
		if err != nil {
			return &fs.PathError{Op: "access", Path: dir, Err: err}
		}
		info, err := os.Stat(dir)
		if err == nil && !info.IsDir() {
			err = &fs.PathError{Op: "access", Path: dir, Err: unix.ENOTDIR}
		}
		return err
	}
}
