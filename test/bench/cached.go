package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	// rounds is how often proxy and baseline take turns, each first in every other round. Many
	// short rounds spread other load of the machine over both.
	rounds       = 40
	baselinePort = 8190
	credentials  = "/latest/meta-data/iam/security-credentials/bench"
)

// cachedCredentials measures the throughput of the cached credential document with a valid session
// token, and of requests for a token, over veth and DNAT by 8 keep-alive connections.
//
// The baseline is a plain net/http handler that writes as many bytes on the same path. The two pods
// differ only in the port of their redirection.
func cachedCredentials(ctx context.Context, tools testbed.Tools, progress io.Writer) (_ []figure, err error) {
	fmt.Fprintf(progress, "cached credentials and tokens: %d rounds of %s\n", rounds, 4*loadTime)
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "bridge", Chain: []testbed.Entry{testbed.Kube2IAM("auto")}})
	if err != nil {
		return nil, err
	}
	defer bed.Close()
	bed.PutRole("bench", "")
	annotations := map[string]string{"iam.amazonaws.com/role": "bench"}
	if _, err := bed.StartProxy(ctx, "--log-level", "info", "--pod-requests-per-second", "0"); err != nil {
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
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		if r.Method == http.MethodPut {
			io.WriteString(w, token)
			return
		}
		io.WriteString(w, document)
	})}
	go server.Serve(listener)
	defer server.Close()

	get := []string{http.MethodGet, credentials, "X-aws-ec2-metadata-token: " + token}
	put := []string{http.MethodPut, "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 21600\r\nContent-Length: 0"}
	documents, err := inTurns(ctx, bed, ours, bare, get)
	if err != nil {
		return nil, err
	}
	tokens, err := inTurns(ctx, bed, ours, bare, put)
	if err != nil {
		return nil, err
	}
	return []figure{
		{"credentials_cached_vs_nethttp", documents.rate, "ratio"},
		{"credentials_cached_p99_vs_nethttp", documents.p99, "ratio"},
		{"credentials_cached_per_second", documents.perSecond, "requests/s"},
		{"token_put_vs_nethttp", tokens.rate, "ratio"},
	}, nil
}

// compared has the medians of the ratios of all rounds.
type compared struct{ rate, p99, perSecond float64 }

func inTurns(ctx context.Context, bed *testbed.Bed, ours, bare *testbed.Sandbox, request []string) (compared, error) {
	var ratios, slow, absolute []float64
	for round := range rounds + 1 {
		var rates, p99s [2]float64
		for turn := range 2 {
			i := (round + turn) % 2
			var err error
			if rates[i], p99s[i], err = rate(ctx, bed, []*testbed.Sandbox{ours, bare}[i], request); err != nil {
				return compared{}, err
			}
		}
		if round == 0 {
			continue // warms up
		}
		ratios, slow, absolute = append(ratios, rates[0]/rates[1]), append(slow, p99s[0]/p99s[1]), append(absolute, rates[0])
	}
	return compared{median(ratios), median(slow), median(absolute)}, nil
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

// rate runs load in the pod's network namespace and returns the requests per second and the 99th
// percentile of their time.
func rate(ctx context.Context, bed *testbed.Bed, pod *testbed.Sandbox, request []string) (perSecond, p99 float64, err error) {
	self, err := os.Executable()
	if err != nil {
		return 0, 0, err
	}
	out, err := pod.Netns.Run(ctx, bed.ClientEnv(), self, append([]string{"load"}, request...)...)
	if err != nil {
		return 0, 0, err
	}
	_, err = fmt.Sscan(out, &perSecond, &p99)
	return perSecond, p99, err
}
