package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// pod is an interface of a pod as a plugin's parameters describe it.
type pod struct {
	containerID, ifName, netns string
	namespace, name, uid       string
	prevResult                 *types100.Result
}

func podOf(s *testbed.Sandbox) pod {
	return pod{s.ContainerID, "eth0", s.Netns.Path(), s.Namespace, s.Name, s.UID, s.Result}
}

// resultOf is what a primary plugin prints for an interface.
func resultOf(hostLink, ifName, netns string, ip netip.Addr) *types100.Result {
	return &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{{Name: hostLink}, {Name: ifName, Sandbox: netns}},
		IPs:        []*types100.IPConfig{{Interface: types100.Int(1), Address: net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(24, 32)}}},
	}
}

// caller runs single plugins on a node as a runtime does.
type caller struct {
	tools testbed.Tools
	bed   *testbed.Bed
	path  string // the plugins' PATH
}

// call runs a plugin and returns the time from its start to its exit. A program in through runs it.
func (c caller) call(ctx context.Context, p pod, entry testbed.Entry, command string, through ...string) (took time.Duration, err error) {
	cmd, err := c.command(ctx, p, entry, command, through...)
	if err != nil {
		return 0, err
	}
	err = c.bed.Node.Do(func() error {
		start := time.Now()
		err := run(cmd)
		took = time.Since(start)
		return err
	})
	return took, err
}

// command returns a plugin's process, which run starts.
func (c caller) command(ctx context.Context, p pod, entry testbed.Entry, command string, through ...string) (*exec.Cmd, error) {
	program, err := c.tools.Path(entry["type"].(string))
	if err != nil {
		return nil, err
	}
	config := map[string]any{"cniVersion": "1.0.0", "name": testbed.Network, "prevResult": p.prevResult}
	for k, v := range entry {
		config[k] = v
	}
	stdin, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	args := append(through, program)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	output := new(bytes.Buffer)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), output, output
	cmd.Env = []string{
		"PATH=" + c.path, "CNI_COMMAND=" + command, "CNI_CONTAINERID=" + p.containerID, "CNI_NETNS=" + p.netns,
		"CNI_IFNAME=" + p.ifName, "CNI_PATH=" + filepath.Dir(program),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=" + p.namespace + ";K8S_POD_NAME=" + p.name + ";K8S_POD_UID=" + p.uid,
	}
	return cmd, nil
}

// run runs a plugin's process. An error contains the plugin's output.
func run(cmd *exec.Cmd) error {
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, cmd.Stdout)
	}
	return nil
}

// processes returns how many programs a call runs besides the plugin's own.
func (c caller) processes(ctx context.Context, p pod, entry testbed.Entry, command string) (int, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	file := filepath.Join(c.bed.Dir, "trace")
	if _, err := c.call(ctx, p, entry, command, self, "trace", file); err != nil {
		return 0, err
	}
	programs, err := readTrace(file)
	return len(programs), err
}
