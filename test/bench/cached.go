package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	// rounds is how often proxy and baseline take turns, each first in every other round. They are many and short, so that
	// what else happens on the machine meets both.
	rounds       = 40
	baselinePort = 8190
	credentials  = "/latest/meta-data/iam/security-credentials/bench"
)

// cachedCredentials is the throughput of the cached credential document with a valid session token, over veth and DNAT, by 8
// keep-alive connections; the baseline is a bare net/http handler that writes the same bytes on the same path. The two pods
// differ in nothing but the port that their requests are redirected to.
func cachedCredentials(ctx context.Context, tools testbed.Tools, progress io.Writer) (_ []figure, err error) {
	fmt.Fprintf(progress, "cached credentials: %d rounds of %s\n", rounds, 2*loadTime)
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "bridge", Chain: []testbed.Entry{testbed.Kube2IAM("auto")}})
	if err != nil {
		return nil, err
	}
	defer bed.Close()
	bed.PutRole("bench", "")
	annotations := map[string]string{"iam.amazonaws.com/role": "bench"}
	if _, err := bed.StartProxy(ctx, "--log-level", "info"); err != nil {
		return nil, err
	}
	ours, err := bed.RunPod(ctx, "default", "ours", annotations)
	if err != nil {
		return nil, err
	}
	elsewhere := testbed.Kube2IAM("auto")
	elsewhere["proxyPort"] = baselinePort
	bed.SetChain(elsewhere)
	bare, err := bed.RunPod(ctx, "default", "bare", annotations)
	if err != nil {
		return nil, err
	}

	token, err := ask(ctx, ours, http.MethodPut, "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds", "21600")
	if err != nil {
		return nil, err
	}
	document, err := ask(ctx, ours, http.MethodGet, credentials, "X-aws-ec2-metadata-token", token)
	if err != nil {
		return nil, err
	}
	listener, err := bed.Node.Listen("tcp", ":"+strconv.Itoa(baselinePort))
	if err != nil {
		return nil, err
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		io.WriteString(w, document)
	})}
	go server.Serve(listener)
	defer server.Close()

	var ratios, absolute []float64
	for round := range rounds + 1 {
		var rates [2]float64
		for turn := range 2 {
			i := (round + turn) % 2
			if rates[i], err = rate(ctx, bed, []*testbed.Sandbox{ours, bare}[i], token); err != nil {
				return nil, err
			}
		}
		if round == 0 {
			continue // warming up
		}
		ratios = append(ratios, rates[0]/rates[1])
		absolute = append(absolute, rates[0])
	}
	return []figure{
		{"credentials_cached_vs_nethttp", median(ratios), "ratio"},
		{"credentials_cached_per_second", median(absolute), "requests/s"},
	}, nil
}

func ask(ctx context.Context, pod *testbed.Sandbox, method, path, header, value string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://169.254.169.254"+path, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set(header, value)
	res, err := pod.Netns.HTTP().Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(bufio.NewReader(res.Body))
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s", method, path, res.Status)
	}
	return string(body), err
}

// rate runs this program's load in the pod's network namespace and reads its answer, requests per second.
func rate(ctx context.Context, bed *testbed.Bed, pod *testbed.Sandbox, token string) (float64, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	out, err := pod.Netns.Run(ctx, bed.ClientEnv(), self, "load", credentials, token)
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(out), 64)
}
