package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	startingPods  = 1000
	startingAtOne = 4 // pods that a kubelet starts at a time
	stsLatency    = 150 * time.Millisecond
	// containerStart is the time between ADD and the first instruction of a pod's first container.
	// A runtime takes longer: it makes the container of the sandbox and that of the pod by runc.
	containerStart = 200 * time.Millisecond
	coldRequests   = 1000
)

// starting measures the first requests of many pods, each sent once with a timeout of a second,
// against a slow STS. It also counts the calls of STS when many requests ask for the same role at
// once.
func starting(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	fmt.Fprintf(progress, "first requests: twice %d pods, STS takes %s\n", startingPods, stsLatency)
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "ptp", Chain: []testbed.Entry{testbed.Kube2IAM("nftables")}})
	if err != nil {
		return nil, err
	}
	defer bed.Close()
	bed.PutRole("bench", "")
	bed.STS.SetFault(sts.Fault{Latency: stsLatency})
	if _, err := bed.StartProxy(ctx, "--log-level", "info"); err != nil {
		return nil, err
	}
	var figures []figure
	for _, way := range []struct {
		name  string
		start time.Duration
	}{{"first_request", containerStart}, {"first_request_at_add", 0}} {
		took, failed, err := firstRequests(ctx, bed, way.name, way.start)
		if err != nil {
			return nil, err
		}
		slices.Sort(took)
		figures = append(figures, figure{way.name + "_failures", float64(failed), "requests"},
			figure{way.name + "_p99_ms", float64(took[len(took)*99/100].Microseconds()) / 1000, "ms"})
	}
	calls, err := coldCalls(ctx, bed)
	return append(figures, figure{"sts_calls_per_1000_cold_requests", calls, "calls"}), err
}

// firstRequests starts pods, a few at a time. Each of them asks for its credentials once.
func firstRequests(ctx context.Context, bed *testbed.Bed, name string, start time.Duration) (took []time.Duration, failed int, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	left := make(chan int, startingPods)
	for i := range startingPods {
		left <- i
	}
	close(left)
	for range startingAtOne {
		wg.Go(func() {
			for i := range left {
				d, ok, startErr := firstRequest(ctx, bed, fmt.Sprintf("%s-%d", strings.ReplaceAll(name, "_", "-"), i), start)
				mu.Lock()
				took = append(took, d)
				if !ok {
					failed++
				}
				if startErr != nil {
					err = startErr
				}
				mu.Unlock()
				if startErr != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return took, failed, err
}

func firstRequest(ctx context.Context, bed *testbed.Bed, name string, start time.Duration) (took time.Duration, ok bool, err error) {
	pod := bed.KubeAPI.PutPod(kubeapi.NewPod(testbed.NodeName, "default", name, map[string]string{"iam.amazonaws.com/role": "bench"}))
	s, err := bed.NewSandbox("default", name, string(pod.UID))
	if err != nil {
		return 0, false, err
	}
	if err := bed.Add(ctx, s); err != nil {
		return 0, false, err
	}
	time.Sleep(start)
	began := time.Now()
	soon, cancel := context.WithTimeout(ctx, time.Second)
	body, asked := ask(soon, s, http.MethodGet, credentials, "Accept", "*/*")
	cancel()
	took = time.Since(began)
	var doc struct{ Code string }
	ok = asked == nil && json.Unmarshal([]byte(body), &doc) == nil && doc.Code == "Success"
	if err := bed.KubeAPI.SetStatus("default", name, corev1.PodRunning, s.IP.String()); err != nil {
		return took, ok, err
	}
	return took, ok, bed.StopPod(ctx, s)
}

// coldCalls counts the calls of STS for one role when a pod asks for it in a thousand concurrent
// requests before it is cached.
func coldCalls(ctx context.Context, bed *testbed.Bed) (float64, error) {
	bed.PutRole("cold", "")
	bed.STS.SetFault(sts.Fault{Latency: 2 * time.Second})
	s, err := bed.RunPod(ctx, "default", "cold", map[string]string{"iam.amazonaws.com/role": "cold"})
	if err != nil {
		return 0, err
	}
	var wg sync.WaitGroup
	errs := make(chan error, coldRequests)
	// A pod may have 256 connections. Each makes several requests.
	const connections = 200
	path := credentials[:len(credentials)-len("bench")] + "cold"
	for range connections {
		wg.Go(func() {
			for range coldRequests / connections {
				_, err := ask(ctx, s, http.MethodGet, path, "Accept", "*/*")
				errs <- err
			}
		})
	}
	wg.Wait()
	for range coldRequests {
		if err := <-errs; err != nil {
			return 0, err
		}
	}
	calls := 0
	for _, call := range bed.STS.Calls() {
		if call.RoleARN == testbed.RoleBase+"cold" {
			calls++
		}
	}
	return float64(calls), nil
}
