package main

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/broker"
)

func joinAddresses(ips []netip.Addr) string {
	var all []string
	for _, ip := range ips {
		all = append(all, ip.String())
	}
	return strings.Join(all, " ")
}

// putRecord writes the record of a pod that holds an address.
func putRecord(t *testing.T, stateDir, namespace, pod, ip string) {
	t.Helper()
	putRecordOf(t, stateDir, attachment.Pod{Namespace: namespace, Name: pod, UID: "uid-" + pod}, ip)
}

func putRecordOf(t *testing.T, stateDir string, pod attachment.Pod, ip string) {
	t.Helper()
	a := netip.MustParseAddr(ip)
	err := attachment.In(stateDir).Put(&attachment.Record{
		ContainerID: pod.Namespace + pod.Name, IfName: "eth0", Network: "net", Netns: "/run/netns/" + pod.Name, Pod: pod,
		IPs: []netip.Addr{a}, Datapath: attachment.DatapathRouted, HostLink: attachment.HostLink{Name: "veth0", Index: 7}, Backend: "nftables", Created: time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestCheckStateDir accepts connections of pods with and without records.
func TestCheckStateDir(t *testing.T) {
	pods := []broker.Assignment{
		{Pod: "ns/one", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}},
		{Pod: "ns/two", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.2")}},
		{Pod: "ns/starting"},
	}
	for name, tt := range map[string]struct {
		before  func(t *testing.T, stateDir string)
		sources []string
		warned  int
	}{
		"no connection":                        {},
		"connection of the node":               {sources: []string{"10.0.0.254"}},
		"unknown pod":                          {sources: []string{"10.0.0.9"}},
		"no record":                            {sources: []string{"10.0.0.1", "10.0.0.2", "10.0.0.1"}, warned: 1},
		"no record, second address":            {sources: []string{"fd00::1"}, warned: 1},
		"the node, then a pod without one":     {sources: []string{"10.0.0.254", "10.0.0.2"}, warned: 1},
		"the pod's record":                     {before: func(t *testing.T, dir string) { putRecord(t, dir, "ns", "one", "10.0.0.1") }, sources: []string{"10.0.0.1"}},
		"another pod's record":                 {before: func(t *testing.T, dir string) { putRecord(t, dir, "ns", "two", "10.0.0.2") }, sources: []string{"10.0.0.1", "10.0.0.1"}},
		"record of a pod of another node":      {before: func(t *testing.T, dir string) { putRecord(t, dir, "ns", "old", "10.0.0.7") }, sources: []string{"10.0.0.1"}, warned: 1},
		"unreadable record":                    {before: func(t *testing.T, dir string) { unreadable(t, dir, "10.0.0.2") }, sources: []string{"10.0.0.1"}},
		"records removed after they were read": {before: vanished, sources: []string{"10.0.0.1"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			records := attachment.NewIndex(attachment.In(dir))
			if tt.before != nil {
				tt.before(t, dir)
				records.Holder(netip.MustParseAddr("10.0.0.99"))
				if name == "records removed after they were read" {
					os.RemoveAll(dir)
				}
			}
			var log strings.Builder
			asked := 0
			accept := func(netip.Addr, netip.AddrPort) bool { asked++; return asked%2 == 0 }
			destinations := checkStateDir(accept, &options{stateDir: dir}, records, func() []broker.Assignment { return pods }, slog.New(slog.NewTextHandler(&log, nil)))
			for i, s := range tt.sources {
				if got := destinations(netip.MustParseAddr(s), netip.AddrPort{}); got != (i%2 == 1) {
					t.Errorf("connection %d: %v", i, got)
				}
			}
			if n := strings.Count(log.String(), "level=WARN"); n != tt.warned || n > 0 && !(strings.Contains(log.String(), dir) && strings.Contains(log.String(), "Or was no pod attached by the plugin yet?")) {
				t.Errorf("%d warnings, want %d: %s", n, tt.warned, &log)
			}
		})
	}
}

func unreadable(t *testing.T, stateDir, ip string) {
	t.Helper()
	dir := filepath.Join(stateDir, "by-ip")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ip), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func vanished(t *testing.T, stateDir string) { unreadable(t, stateDir, "10.0.0.2") }

// TestDebugStore: STS denies the role of some pods, some have no role, and some have addresses
// without a record, with the record of another pod, or that another pod reports too.
func TestDebugStore(t *testing.T) {
	client := oneRunningPod()
	for _, p := range []struct{ name, role, ip string }{
		{"denied", "denied", "10.0.0.2"}, {"no-role", "", "10.0.0.3"}, {"unrecorded", "reader", "10.0.0.4"}, {"anothers", "reader", "10.0.0.5"},
		{"namesakes", "reader", "10.0.0.6"}, {"no-uid", "reader", "10.0.0.7"}, {"static", "reader", "10.0.0.8"}, {"one-of-two", "reader", "10.0.0.9"}, {"two-of-two", "", "10.0.0.9"},
	} {
		pod := runningPod(p.name, p.role, p.ip)
		if p.name == "static" {
			pod.UID, pod.Annotations["kubernetes.io/config.mirror"] = "uid-mirror", "uid-static"
		}
		if err := client.Tracker().Add(pod); err != nil {
			t.Fatal(err)
		}
	}
	p, dir, end := startComponentsIn(t, client)
	defer end()
	putRecord(t, dir, "ns", "pod", "10.0.0.1")
	putRecord(t, dir, "ns", "denied", "10.0.0.2")
	putRecord(t, dir, "ns", "no-role", "10.0.0.3")
	putRecord(t, dir, "other", "anothers", "10.0.0.5")
	putRecordOf(t, dir, attachment.Pod{Namespace: "ns", Name: "namesakes", UID: "uid-of-an-earlier-one"}, "10.0.0.6")
	putRecordOf(t, dir, attachment.Pod{Namespace: "ns", Name: "no-uid"}, "10.0.0.7")
	putRecord(t, dir, "ns", "static", "10.0.0.8")
	putRecord(t, dir, "ns", "one-of-two", "10.0.0.9")
	var got map[string]storeEntry
	eventually(t, "STS has answered for all", func() bool {
		got = make(map[string]storeEntry)
		for _, e := range p.store() {
			got[e.Pod] = e
		}
		return len(got) == 10 && p.cache.Stats().Pending == 0
	})
	for pod, want := range map[string]struct{ role, reason, sts, without, ambiguous string }{
		"ns/pod":        {role: "reader"},
		"ns/denied":     {role: "denied", sts: "AccessDenied"},
		"ns/no-role":    {reason: "no role"},
		"ns/unrecorded": {role: "reader", without: "10.0.0.4"},
		"ns/anothers":   {role: "reader", without: "10.0.0.5"},
		"ns/namesakes":  {role: "reader", without: "10.0.0.6"},
		"ns/no-uid":     {role: "reader"},
		"ns/static":     {role: "reader"},
		"ns/one-of-two": {role: "reader", ambiguous: "10.0.0.9"},
		"ns/two-of-two": {reason: "no role", without: "10.0.0.9", ambiguous: "10.0.0.9"},
	} {
		e := got[pod]
		without, ambiguous := joinAddresses(e.WithoutRecord), joinAddresses(e.Ambiguous)
		if !strings.HasSuffix(e.Role, want.role) || (e.Reason == "") != (want.reason == "") || (e.STSError == "") != (want.sts == "") ||
			!strings.Contains(e.STSError, want.sts) || without != want.without || ambiguous != want.ambiguous {
			t.Errorf("%s: %+v, want %+v", pod, e, want)
		}
	}
	if _, body := get(adminServer(p, &options{debug: true}, slog.New(slog.DiscardHandler)).Handler, "/debug/store"); !strings.Contains(body, `"stsError": "sts: denied: AccessDenied`) ||
		!strings.Contains(body, `"withoutRecord": [`) || strings.Contains(body, "secret") {
		t.Error(body)
	}
}
