package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	fewPods, manyPods = 25, 250
	// agentRounds is how many rounds are measured.
	agentRounds = 31
)

// reconciling measures a round of the agent that finds nothing to repair, how it grows with the
// number of pods, and the processes that it starts.
func reconciling(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	var figures []figure
	for _, backend := range []attachment.Backend{attachment.BackendIPTables, attachment.BackendNFTables} {
		measured, err := reconcilingWith(ctx, tools, backend, progress)
		if err != nil {
			return nil, fmt.Errorf("agent with %s: %w", backend, err)
		}
		figures = append(figures, measured...)
	}
	return figures, nil
}

func reconcilingWith(ctx context.Context, tools testbed.Tools, backend attachment.Backend, progress io.Writer) ([]figure, error) {
	fmt.Fprintf(progress, "the agent with %s, %d and %d pods: %d rounds\n", backend, fewPods, manyPods, agentRounds)
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "bridge"})
	if err != nil {
		return nil, err
	}
	defer bed.Close()
	a := newAgent(bed, backend)
	defer a.Close()
	path, err := iptablesPath(bed)
	if err != nil {
		return nil, err
	}
	entry := testbed.Kube2IAM(string(backend))
	entry["stateDir"] = bed.StateDir
	pods, err := newFleet(caller{tools, bed, path}, entry, testbed.PodSubnet.Addr().Next())
	if err != nil {
		return nil, err
	}
	var ms [2]float64
	for i, n := range []int{fewPods, manyPods} {
		if err := pods.grow(ctx, n); err != nil {
			return nil, err
		}
		if ms[i], err = a.round(ctx, bed); err != nil {
			return nil, err
		}
	}
	if backend == attachment.BackendNFTables {
		return []figure{{"reconcile_250_nftables_ms", ms[1], "ms"}}, nil
	}
	processes, err := agentProcesses(ctx, tools, bed, backend)
	return []figure{
		{"reconcile_25_ms", ms[0], "ms"},
		{"reconcile_250_ms", ms[1], "ms"},
		{"reconcile_growth", ms[1] / ms[0] * fewPods / manyPods, "ratio"},
		{"reconcile_processes_250", float64(processes), "processes"},
	}, err
}

// loggedAgent is the node's agent and its log.
type loggedAgent struct {
	*agent.Agent
	log *bytes.Buffer
}

// newAgent is wired as "kube2iam-agent run" is, to a runtime's cache that knows of each pod.
func newAgent(bed *testbed.Bed, backend attachment.Backend) loggedAgent {
	log := new(bytes.Buffer)
	settings := attach.Settings{
		ProxyPort: 8181, MetadataIP: netip.MustParseAddrPort(testbed.MetadataAddr).Addr(), StateDir: bed.StateDir,
		Backend: string(backend), Guard: true, Mark: 0x1000,
	}
	cache := agent.Cache{
		Dir:       cacheDir(bed),
		ParsePod:  netconf.ParsePod,
		Chained:   func() ([]string, error) { return conflist.Chained(filepath.Join(bed.Dir, "net.d"), "kube2iam-cni") },
		HasPlugin: func([]byte) bool { return false },
	}
	return loggedAgent{agent.New(agent.Config{Settings: settings, Cache: cache}, agent.Host(), slog.New(slog.NewTextHandler(log, nil))), log}
}

// round returns the median time of rounds after the first one, in milliseconds. A round that logs a
// repair or a warning is an error.
func (a loggedAgent) round(ctx context.Context, bed *testbed.Bed) (float64, error) {
	var ms []float64
	err := bed.Node.Do(func() error {
		for round := range agentRounds + 1 {
			a.log.Reset()
			start := time.Now()
			err := a.Round(ctx)
			took := time.Since(start)
			a.Close() // as after each round of Run
			if err != nil {
				return err
			}
			if round == 0 {
				continue
			}
			if a.log.Len() > 0 {
				return fmt.Errorf("a round in which nothing is wrong: %s", a.log)
			}
			ms = append(ms, 1000*took.Seconds())
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return median(ms), nil
}

// agentProcesses returns how many programs a round runs, in the IP family with most of them. It is
// the agent's first round, which checks at least as much as any later one.
func agentProcesses(ctx context.Context, tools testbed.Tools, bed *testbed.Bed, backend attachment.Backend) (int, error) {
	program, err := tools.Path("kube2iam-agent")
	if err != nil {
		return 0, err
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	file := filepath.Join(bed.Dir, "trace")
	if _, err := bed.Node.Run(ctx, bed.ClientEnv(), self, "trace", file, program, "run", "--once",
		"--state-dir", bed.StateDir, "--backend", string(backend), "--cni-cache-dir", cacheDir(bed), "--cni-conf-dir", filepath.Join(bed.Dir, "net.d")); err != nil {
		return 0, err
	}
	programs, err := readTrace(file)
	var v4, v6 int
	for _, name := range programs {
		if strings.HasPrefix(filepath.Base(name), "ip6tables") {
			v6++
		} else {
			v4++
		}
	}
	return max(v4, v6), err
}
