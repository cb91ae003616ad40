package metrics

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
)

// TestEveryMetricIsDocumented compares the metrics that are registered, and their labels, with the
// table in docs/operations.md.
func TestEveryMetricIsDocumented(t *testing.T) {
	descriptions := make(chan *prometheus.Desc)
	go func() {
		defer close(descriptions)
		New("v1", "abc", "today", func() int { return 0 }, func() bool { return false }).registry.Describe(descriptions)
	}()
	name := regexp.MustCompile(`fqName: "(kube2iam_\w+)".* constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)
	registered := make(map[string]string)
	for d := range descriptions {
		if found := name.FindStringSubmatch(d.String()); found != nil {
			labels := append(constant.FindAllString(found[2], -1), strings.FieldsFunc(found[3], func(r rune) bool { return r == ',' || r == ' ' })...)
			for i := range labels {
				labels[i] = strings.TrimSuffix(labels[i], "=")
			}
			slices.Sort(labels)
			registered[found[1]] = strings.Join(labels, " ")
		}
	}
	if len(registered) < 5 {
		t.Fatalf("registered are %v", slices.Collect(maps.Keys(registered)))
	}
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := make(map[string]string)
	for _, row := range regexp.MustCompile("(?m)^\\| `(kube2iam_\\w+)` \\| \\w+ \\| (.*?) \\|").FindAllStringSubmatch(string(text), -1) {
		labels := regexp.MustCompile("`\\w+`").FindAllString(row[2], -1)
		for i := range labels {
			labels[i] = strings.Trim(labels[i], "`")
		}
		slices.Sort(labels)
		documented[row[1]] = strings.Join(labels, " ")
	}
	if diff := cmp.Diff(registered, documented); diff != "" {
		t.Errorf("metrics and their labels (-registered +in the table of docs/operations.md):\n%s", diff)
	}
}

var constant = regexp.MustCompile(`\w+=`)
