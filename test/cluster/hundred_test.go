//go:build cluster

package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"text/template"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/resource"
)

const (
	hundred = 100 // less than the kubelet's default of 110
	batch   = 10
)

// numbered is the values of one pod for the manifest's template.
type numbered struct {
	Name, Role string
	Batch      int
}

// testHundredPods runs a hundred redirected pods at the same time, and then deletes them.
func testHundredPods(t *testing.T, n *node, _ *cloud) {
	n.awaitNoRecords(t)
	before := n.rules(t)

	began := time.Now()
	vended := make(map[string]string) // the pod that has an access key
	var took []int
	for number := range hundred / batch {
		pods := n.createBatch(t, number, batch)
		got := n.outcomes(t, fmt.Sprintf("batch=%d", number), len(pods))
		for _, pod := range pods {
			first := got[pod.Name]
			switch other, known := vended[first.AccessKeyID]; {
			case first.Error != "":
				t.Errorf("%s: its first request failed after %d ms: %s", pod.Name, first.Milliseconds, first.Error)
			case first.Role != pod.Role:
				t.Errorf("%s: its role is %q, want %q", pod.Name, first.Role, pod.Role)
			case known:
				t.Errorf("%s has the access key of %s", pod.Name, other)
			}
			vended[first.AccessKeyID] = pod.Name
			took = append(took, first.Milliseconds)
		}
	}
	slices.Sort(took)
	t.Logf("%d pods in %s; their first requests took %d ms in the median and %d ms at most",
		hundred, time.Since(began).Round(time.Second), took[len(took)/2], took[len(took)-1])

	// The kubelet repeats a failed ADD, so a running pod does not prove that none failed.
	failed := n.must(t, "kubectl", "get", "events",
		"--field-selector=reason=FailedCreatePodSandBox", "--output=jsonpath={.items[*].message}")
	if failed != "" {
		t.Errorf("pods whose network could not be set up at once: %s", failed)
	}
	// The control of the comparison below: now there are records and rules.
	if got, err := n.held(); err != nil || got != (held{hundred, hundred}) {
		t.Errorf("on record with %d pods: %+v, %v", hundred, got, err)
	}
	if got := redirections(n.rules(t)); got != hundred {
		t.Errorf("%d redirections to the proxy with %d pods", got, hundred)
	}
	// The memory requests of the manifests exceed the use.
	for program, requests := range map[string]string{"kube2iam-agent": "kube2iam-cni-agent", "kube2iam-proxy": "kube2iam-proxy"} {
		asked, err := resource.ParseQuantity(n.must(t, "kubectl", "get", "daemonset", requests, "--namespace=kube-system",
			"--output=jsonpath={.spec.template.spec.containers[0].resources.requests.memory}"))
		if err != nil {
			t.Fatal(err)
		}
		rss := n.memory(t, program)
		fmt.Printf("figure %s_rss_mib %.1f MiB\n", strings.ReplaceAll(requests, "-", "_"), float64(rss)/(1<<20))
		if rss > asked.Value() {
			t.Errorf("%s has %d bytes, and asks for %d", program, rss, asked.Value())
		}
	}

	began = time.Now()
	n.must(t, "kubectl", "delete", "pod", "--selector=app=first-request")
	n.awaitNoRecords(t)
	await(t, podLimit, "the rules of before", func(context.Context) error {
		if diff := cmp.Diff(before, n.rules(t)); diff != "" {
			return fmt.Errorf("-before +after:\n%s", diff)
		}
		return nil
	})
	t.Logf("deleted in %s, with no rule and no record left", time.Since(began).Round(time.Second))
}

// memory returns the memory of a program on the node, in bytes.
func (n *node) memory(t *testing.T, program string) (rss int64) {
	t.Helper()
	status := n.must(t, "sh", "-c", "cat /proc/$(pgrep -o -x "+program+")/status")
	for line := range strings.Lines(status) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &rss); err == nil {
			return rss << 10
		}
	}
	t.Fatalf("%s: no VmRSS in %s", program, status)
	return 0
}

// createBatch creates the pods of one batch with one call of kubectl. Ten roles take turns.
func (n *node) createBatch(t *testing.T, number, batch int) []numbered {
	t.Helper()
	var pods []numbered
	for i := range batch {
		name := fmt.Sprintf("first-request-%d-%d", number, i)
		pods = append(pods, numbered{Name: name, Role: fmt.Sprintf("team-%d", i%10), Batch: number})
	}
	text, err := os.ReadFile("testdata/first-request.yaml.tmpl")
	if err != nil {
		t.Fatal(err)
	}
	var manifest strings.Builder
	if err := template.Must(template.New("manifest").Parse(string(text))).Execute(&manifest, pods); err != nil {
		t.Fatal(err)
	}
	if _, err := n.output(t.Context(), strings.NewReader(manifest.String()), "kubectl", "create", "--filename=-"); err != nil {
		t.Fatal(err)
	}
	return pods
}

// held is the number of attachments and of addresses on record.
type held struct{ Attachments, Addresses int }

func (n *node) held() (held, error) {
	var counts [2]int
	for i, dir := range []string{"attachments", "by-ip"} {
		entries, err := os.ReadDir(n.path(stateDir + "/" + dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return held{}, err
		}
		counts[i] = len(entries)
	}
	return held{counts[0], counts[1]}, nil
}

// awaitNoRecords waits until there are no records. The runtime calls DEL after the API server has
// deleted the pod.
func (n *node) awaitNoRecords(t *testing.T) {
	t.Helper()
	await(t, podLimit, "no record left", func(context.Context) error {
		left, err := n.held()
		if err == nil && left != (held{}) {
			err = fmt.Errorf("there are %+v", left)
		}
		return err
	})
}

// packets matches the counter of a chain in the output of iptables-save.
var packets = regexp.MustCompile(` \[\d+:\d+\]$`)

// rules returns the node's chains and rules of iptables and the lines of the plugin's nftables
// tables, sorted.
func (n *node) rules(t *testing.T) []string {
	t.Helper()
	var rules []string
	for line := range strings.Lines(n.must(t, "iptables-save")) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "#") {
			rules = append(rules, packets.ReplaceAllString(line, ""))
		}
	}
	// The backend `auto` is nftables here: one line for each rule and each element.
	table := n.must(t, "nft", "--stateless", "list", "table", "ip", "kube2iam-cni")
	table = strings.NewReplacer("elements = {", "\n", ",", "\n", "}", "\n").Replace(table)
	for line := range strings.Lines(table) {
		if line = strings.TrimSpace(line); line != "" {
			rules = append(rules, line)
		}
	}
	slices.Sort(rules) // nft lists elements in no order
	return rules
}

// redirections counts the elements that send a pod to the proxy.
func redirections(rules []string) int {
	return len(slices.DeleteFunc(slices.Clone(rules), func(rule string) bool {
		return !strings.HasSuffix(rule, " : "+nodeIP+" . "+proxyPort)
	}))
}
