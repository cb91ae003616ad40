package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	memoryPods       = 250
	memoryNamespaces = 50   // of the node's pods
	otherNamespaces  = 5000 // of the cluster
	otherPods        = 5000
)

// memory measures the resident memory of the proxy on a large node of a large cluster with
// namespace restrictions, and how much each pod adds to it.
func memory(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	fmt.Fprintf(progress, "the proxy's memory with %d pods: %s\n", memoryPods, settling)
	var sizes [2]int
	var wg errgroup.Group
	for i, pods := range []int{0, memoryPods} {
		wg.Go(func() (err error) {
			sizes[i], err = occupied(ctx, tools, pods)
			return err
		})
	}
	if err := wg.Wait(); err != nil {
		return nil, err
	}
	return []figure{
		{"rss_mib_250_pods", float64(sizes[1]) / (1 << 20), "MiB"},
		{"rss_kib_per_pod", float64(sizes[1]-sizes[0]) / memoryPods / (1 << 10), "KiB"},
	}, nil
}

// occupied returns the resident memory of a proxy that has the credentials of so many pods.
func occupied(ctx context.Context, tools testbed.Tools, pods int) (int, error) {
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "ptp"})
	if err != nil {
		return 0, err
	}
	defer bed.Close()
	proxy, err := crowded(ctx, bed, pods)
	if err != nil {
		return 0, err
	}
	return settled(ctx, proxy.PID())
}

// crowded starts a proxy with additional flags in a large cluster and waits until it has the
// credentials of so many pods on its node.
func crowded(ctx context.Context, bed *testbed.Bed, pods int, flags ...string) (*testbed.Process, error) {
	bed.PutRole("bench", "")
	for i := range otherNamespaces {
		bed.KubeAPI.PutNamespace(fmt.Sprint("team-", i), map[string]string{
			"iam.amazonaws.com/allowed-roles": `["bench", "team-*"]`, "kubectl.kubernetes.io/last-applied-configuration": strings.Repeat("x", 1000)})
	}
	for i := range otherPods {
		bed.KubeAPI.PutPod(kubeapi.NewPod("another", fmt.Sprint("team-", i%otherNamespaces), fmt.Sprint("elsewhere-", i), nil))
	}
	proxy, err := bed.StartProxy(ctx, append([]string{"--log-level", "info", "--namespace-restrictions"}, flags...)...)
	if err != nil {
		return nil, err
	}
	annotations := map[string]string{"iam.amazonaws.com/role": "bench", "example.org/other": strings.Repeat("x", 2000)}
	for i := range pods {
		bed.KubeAPI.PutPod(kubeapi.NewRunningPod(testbed.NodeName, fmt.Sprint("team-", i%memoryNamespaces), fmt.Sprint("pod-", i), annotations, podAddress(i)))
	}
	for deadline := time.Now().Add(2 * time.Minute); len(bed.STS.Calls()) < pods; {
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("after two minutes STS was asked %d times for %d pods", len(bed.STS.Calls()), pods)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return proxy, nil
}

// settling is longer than two minutes, after which the Go runtime collects garbage even if idle.
const settling = 150 * time.Second

// settled returns the resident memory of a process after some time without work.
func settled(ctx context.Context, pid int) (int, error) {
	select {
	case <-time.After(settling):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return resident(pid)
}

// resident returns the resident memory of a process.
func resident(pid int) (int, error) {
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(statm))
	if len(fields) < 2 {
		return 0, fmt.Errorf("statm of %d is %q", pid, statm)
	}
	pages, err := strconv.Atoi(fields[1])
	return pages * os.Getpagesize(), err
}
