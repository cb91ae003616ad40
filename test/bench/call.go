package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// caller calls single plugins for one pod as a runtime does.
type caller struct {
	tools testbed.Tools
	bed   *testbed.Bed
	pod   *testbed.Sandbox
	path  string // the plugins' PATH
}

// call is the time from a plugin's start to its exit. Its program is run through another where one is given.
func (c caller) call(ctx context.Context, entry testbed.Entry, command string, through ...string) (took time.Duration, err error) {
	program, err := c.tools.Path(entry["type"].(string))
	if err != nil {
		return 0, err
	}
	config := map[string]any{"cniVersion": "1.0.0", "name": testbed.Network, "prevResult": c.pod.Result}
	for k, v := range entry {
		config[k] = v
	}
	stdin, err := json.Marshal(config)
	if err != nil {
		return 0, err
	}
	args := append(through, program)
	var stdout, stderr bytes.Buffer
	err = c.bed.Node.Do(func() error {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
		cmd.Env = []string{
			"PATH=" + c.path, "CNI_COMMAND=" + command, "CNI_CONTAINERID=" + c.pod.ContainerID, "CNI_NETNS=" + c.pod.Netns.Path(),
			"CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Dir(program),
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=" + c.pod.Namespace + ";K8S_POD_NAME=" + c.pod.Name + ";K8S_POD_UID=" + c.pod.UID,
		}
		start := time.Now()
		err := cmd.Run()
		took = time.Since(start)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("%s %s: %w: %s%s", entry["type"], command, err, &stdout, &stderr)
	}
	return took, nil
}

// processes is how many programs the call runs besides the plugin's own.
func (c caller) processes(ctx context.Context, entry testbed.Entry, command string) (int, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	file := filepath.Join(c.bed.Dir, "trace")
	if _, err := c.call(ctx, entry, command, self, "trace", file); err != nil {
		return 0, err
	}
	programs, err := readTrace(file)
	return len(programs), err
}
