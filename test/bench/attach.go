package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// attachments is how often each plugin adds and deletes.
const attachments = 15

// attaching is the time of an ADD and a DEL against those of the portmap plugin with one port mapping: the same pod, the same
// form of iptables, both in the steady state, in turn. The headline figure is the worse of the two forms.
func attaching(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	var figures []figure
	worst := map[string]float64{}
	for _, form := range []string{"nft", "legacy"} {
		fmt.Fprintf(progress, "ADD and DEL with iptables-%s: %d times\n", form, attachments)
		ratios, err := attachingWith(ctx, tools, form)
		if err != nil {
			return nil, err
		}
		for _, command := range []string{"add", "del"} {
			ratio := ratios[command]
			worst[command] = max(worst[command], ratio)
			figures = append(figures, figure{command + "_vs_portmap_" + form, ratio, "ratio"})
		}
		figures = append(figures, figure{"add_" + form + "_ms", ratios["ms"], "ms"})
	}
	return append(figures, figure{"add_vs_portmap", worst["add"], "ratio"}, figure{"del_vs_portmap", worst["del"], "ratio"}), nil
}

func attachingWith(ctx context.Context, tools testbed.Tools, form string) (_ map[string]float64, err error) {
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "bridge"})
	if err != nil {
		return nil, err
	}
	defer bed.Close()
	pod, err := bed.RunPod(ctx, "default", "pod", nil)
	if err != nil {
		return nil, err
	}
	path, err := iptablesOf(bed, form)
	if err != nil {
		return nil, err
	}
	kube2iam := testbed.Kube2IAM("iptables-" + form)
	kube2iam["stateDir"] = bed.StateDir
	portmap := testbed.Entry{
		"type": "portmap", "backend": "iptables", "capabilities": map[string]bool{"portMappings": true},
		"runtimeConfig": map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}},
	}
	ratios := map[string][]float64{}
	for i := range attachments + 1 {
		took := map[string]time.Duration{}
		for _, entry := range []testbed.Entry{kube2iam, portmap} {
			for _, command := range []string{"ADD", "DEL"} {
				d, err := call(ctx, tools, bed, pod, entry, command, path)
				if err != nil {
					return nil, err
				}
				took[entry["type"].(string)+command] = d
			}
		}
		if i == 0 {
			continue // each makes its chains in its first ADD
		}
		ratios["add"] = append(ratios["add"], took["kube2iam-cniADD"].Seconds()/took["portmapADD"].Seconds())
		ratios["del"] = append(ratios["del"], took["kube2iam-cniDEL"].Seconds()/took["portmapDEL"].Seconds())
		ratios["ms"] = append(ratios["ms"], 1000*took["kube2iam-cniADD"].Seconds())
	}
	out := map[string]float64{}
	for name, values := range ratios {
		out[name] = median(values)
	}
	return out, nil
}

// iptablesOf is a PATH on which iptables is of the form, which is how portmap is told.
func iptablesOf(bed *testbed.Bed, form string) (string, error) {
	dir := filepath.Join(bed.Dir, "iptables")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	for _, name := range []string{"iptables", "ip6tables"} {
		multi, err := exec.LookPath("xtables-" + form + "-multi")
		if err != nil {
			return "", fmt.Errorf("%w (Debian package iptables)", err)
		}
		if err := os.Symlink(multi, filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	return dir + ":/usr/sbin:/usr/bin:/sbin:/bin", nil
}

// call runs one plugin as a runtime does, and tells how long it took from start to exit.
func call(ctx context.Context, tools testbed.Tools, bed *testbed.Bed, pod *testbed.Sandbox, entry testbed.Entry, command, path string) (time.Duration, error) {
	program, err := tools.Path(entry["type"].(string))
	if err != nil {
		return 0, err
	}
	config := map[string]any{"cniVersion": "1.0.0", "name": testbed.Network, "prevResult": pod.Result}
	for k, v := range entry {
		config[k] = v
	}
	stdin, err := json.Marshal(config)
	if err != nil {
		return 0, err
	}
	var stdout, stderr bytes.Buffer
	var took time.Duration
	err = bed.Node.Do(func() error {
		cmd := exec.CommandContext(ctx, program)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
		cmd.Env = []string{
			"PATH=" + path, "CNI_COMMAND=" + command, "CNI_CONTAINERID=" + pod.ContainerID, "CNI_NETNS=" + pod.Netns.Path(),
			"CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Dir(program),
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=" + pod.Namespace + ";K8S_POD_NAME=" + pod.Name + ";K8S_POD_UID=" + pod.UID,
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
