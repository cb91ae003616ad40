package agent

import (
	"encoding/json"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// cacheEntry is what libcni writes of an attachment (libcni/api.go, cachedInfo), with the result of
// a plugin.
func cacheEntryOf(id, netnsPath string, result any, change ...func(map[string]any)) string {
	entry := map[string]any{
		"kind": "cniCacheV1", "containerId": id, "config": []byte(`{"cniVersion":"1.1.0","name":"net","plugins":[]}`), "ifName": "eth0", "networkName": "net",
		"cniArgs": [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "team"}, {"K8S_POD_NAME", id}, {"K8S_POD_INFRA_CONTAINER_ID", id}},
		"netns":   netnsPath, "capabilityArgs": map[string]any{"portMappings": []any{}}, "result": result,
	}
	for _, c := range change {
		c(entry)
	}
	data, err := json.Marshal(entry)
	if err != nil {
		panic(err)
	}
	return string(data)
}

func without(key string) func(map[string]any) {
	return func(entry map[string]any) { delete(entry, key) }
}

func with(key string, value any) func(map[string]any) {
	return func(entry map[string]any) { entry[key] = value }
}

// result is one as plugins of a version of the CNI specification return it.
func result(version string, ips ...string) any { return resultBy(hostLink, version, ips...) }

// resultBy is a result that names the pod's host side; of the plugin of an interface that has none
// where it is empty.
func resultBy(hostLink, version string, ips ...string) any {
	r := map[string]any{"cniVersion": version, "dns": map[string]any{}}
	var list []any
	for _, ip := range ips {
		family, bits := "4", "/24"
		if strings.Contains(ip, ":") {
			family, bits = "6", "/64"
		}
		switch version {
		case "0.1.0", "0.2.0":
			r["ip"+family] = map[string]any{"ip": ip + bits}
		case "0.3.0", "0.3.1", "0.4.0":
			list = append(list, map[string]any{"version": family, "address": ip + bits, "interface": 2})
		default:
			list = append(list, map[string]any{"address": ip + bits, "interface": 2})
		}
	}
	if list != nil {
		r["ips"] = list
		interfaces := []any{map[string]any{"name": "br0"}, map[string]any{"name": hostLink}, map[string]any{"name": "eth0", "sandbox": "/ns"}}
		if hostLink == "" {
			interfaces = interfaces[2:]
		}
		r["interfaces"] = interfaces
	}
	return r
}

// hostLink is the pod's host side in each result whose version names interfaces.
const hostLink = "veth7"

func TestFindUnattached(t *testing.T) {
	one := func(id, netnsPath string, ips ...string) attach.Request {
		r := attach.Request{ContainerID: id, IfName: "eth0", Netns: netnsPath, Network: "net", Pod: attachment.Pod{Namespace: "team", Name: id}}
		for _, ip := range ips {
			r.IPs = append(r.IPs, netip.MustParseAddr(ip))
		}
		return r
	}
	const latest = "1.1.0"
	type want struct {
		requests []attach.Request
		err      string // a part of it; none where it is empty
	}
	tests := map[string]struct {
		entries map[string]string // by file name
		holding map[string]string // the address of each namespace's eth0; a path in NETNS is one that is searched
		want
	}{
		"no entry": {},
		"an entry that names its namespace": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result(latest, "10.1.0.5"))},
			map[string]string{"/run/netns/c1": "10.1.0.5"},
			want{[]attach.Request{one("c1", "/run/netns/c1", "10.1.0.5")}, ""},
		},
		"a namespace that another pod has by now": { // by the PID in its path
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/proc/7/of-another-link", result(latest, "10.1.0.5"))},
			map[string]string{"/proc/7/of-another-link": "10.1.0.5"}, want{nil, `c1@eth0: its interface leads to "veth9"`},
		},
		"a namespace that another pod has by now, which is found": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/proc/7/of-another-link", result(latest, "10.1.0.5")),
				"net-c2-eth0": cacheEntryOf("c2", "/proc/7/of-another-link", resultBy("veth9", latest, "10.1.0.5"))},
			map[string]string{"/proc/7/of-another-link": "10.1.0.5"},
			want{[]attach.Request{one("c2", "/proc/7/of-another-link", "10.1.0.5")}, "c1@eth0"},
		},
		"a veth that is none by now": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/replaced", result(latest, "10.1.0.5"))},
			map[string]string{"/run/netns/replaced": "10.1.0.5"}, want{nil, `c1@eth0: its interface leads to ""`},
		},
		"a result that names no host interface": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/replaced", resultBy("", latest, "10.1.0.5"))},
			map[string]string{"/run/netns/replaced": "10.1.0.5"},
			want{[]attach.Request{one("c1", "/run/netns/replaced", "10.1.0.5")}, ""},
		},
		"an entry of a libcni that names none": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "", result(latest, "10.1.0.5"), without("netns"))},
			map[string]string{"NETNS/x": "10.1.0.4", "NETNS/y": "10.1.0.5"},
			want{[]attach.Request{one("c1", "NETNS/y", "10.1.0.5")}, ""},
		},
		"an entry of a libcni that names none, and another pod with its address": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "", result(latest, "10.1.0.5"), without("netns"))},
			map[string]string{"NETNS/of-another-link": "10.1.0.5"}, want{},
		},
		"an entry of a libcni that names none, and a result that names no interface": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "", result("0.2.0", "10.1.0.5"), without("netns"))},
			map[string]string{"NETNS/y": "10.1.0.5"}, want{},
		},
		"an entry whose address two namespaces have": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "", result(latest, "10.1.0.5"), without("netns"))},
			map[string]string{"NETNS/x": "10.1.0.5", "NETNS/y": "10.1.0.5"}, want{},
		},
		"a pod that is gone": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result(latest, "10.1.0.5")),
				"net-c2-eth0": cacheEntryOf("c2", "", result(latest, "10.1.0.6"), without("netns"))},
			map[string]string{"NETNS/x": "10.1.0.7"}, want{},
		},
		"a pod that has another address by now": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result(latest, "10.1.0.5"))},
			map[string]string{"/run/netns/c1": "10.1.0.6"}, want{},
		},
		"a pod that has one of its two addresses": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result(latest, "fd00:1::5", "10.1.0.5"))},
			map[string]string{"/run/netns/c1": "10.1.0.5"},
			want{[]attach.Request{one("c1", "/run/netns/c1", "fd00:1::5", "10.1.0.5")}, ""},
		},
		"a container that is no pod": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result(latest, "10.1.0.5"), without("cniArgs"))},
			map[string]string{"/run/netns/c1": "10.1.0.5"}, want{},
		},
		"half a pod, and a whole one": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result(latest, "10.1.0.5"), with("cniArgs", [][2]string{{"K8S_POD_NAME", "x"}})),
				"net-c2-eth0": cacheEntryOf("c2", "/run/netns/c2", result(latest, "10.1.0.6"))},
			map[string]string{"/run/netns/c1": "10.1.0.5", "/run/netns/c2": "10.1.0.6"},
			want{[]attach.Request{one("c2", "/run/netns/c2", "10.1.0.6")}, "net-c1-eth0: half a pod"},
		},
		"files that are no entries": {
			map[string]string{
				"empty": "", "garbage": "\x00\xffgarbage", "a list": "[]", "a word": `"cniCacheV1"`, "nothing": "{}",
				"half-written":  cacheEntryOf("c1", "/run/netns/c1", result(latest, "10.1.0.5"))[:200],
				"an old result": `{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.1.0.5/24"}]}`,
				"another kind":  cacheEntryOf("c1", "/run/netns/c1", result(latest, "10.1.0.5"), with("kind", "cniCacheV2")),
				"too large":     cacheEntryOf("c1", "/run/netns/c1", result(latest, "10.1.0.5"), with("config", make([]byte, maxCacheEntry))),
			},
			map[string]string{"/run/netns/c1": "10.1.0.5"}, want{},
		},
		"a container ID that is none": {
			map[string]string{"net-c1-eth0": cacheEntryOf("../c1", "/run/netns/c1", result(latest, "10.1.0.5"))},
			map[string]string{"/run/netns/c1": "10.1.0.5"}, want{nil, "net-c1-eth0: container ID"},
		},
		"a result of a version to come": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result("9.0.0", "10.1.0.5"))},
			map[string]string{"/run/netns/c1": "10.1.0.5"}, want{nil, "net-c1-eth0: "},
		},
		"no result": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", nil, without("result"))},
			map[string]string{"/run/netns/c1": "10.1.0.5"}, want{nil, "net-c1-eth0: "},
		},
		"a result without addresses": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result(latest))},
			map[string]string{"/run/netns/c1": "10.1.0.5"}, want{},
		},
		"two that claim one namespace": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result(latest, "10.1.0.5")),
				"net-c2-eth0": cacheEntryOf("c2", "/run/netns/c1", result(latest, "10.1.0.5")),
				"net-c3-eth0": cacheEntryOf("c3", "/run/netns/c3", result(latest, "10.1.0.6"))},
			map[string]string{"/run/netns/c1": "10.1.0.5", "/run/netns/c3": "10.1.0.6"},
			want{[]attach.Request{one("c3", "/run/netns/c3", "10.1.0.6")}, ""},
		},
		"two that claim one namespace, of which one must be searched": {
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "NETNS/x", result(latest, "10.1.0.5")),
				"net-c2-eth0": cacheEntryOf("c2", "", result(latest, "10.1.0.5"), without("netns"))},
			map[string]string{"NETNS/x": "10.1.0.5"}, want{},
		},
	}
	for _, version := range []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		tests["a result of version "+version] = struct {
			entries, holding map[string]string
			want
		}{
			map[string]string{"net-c1-eth0": cacheEntryOf("c1", "/run/netns/c1", result(version, "10.1.0.5", "fd00:1::5"))},
			map[string]string{"/run/netns/c1": "10.1.0.5"},
			want{[]attach.Request{one("c1", "/run/netns/c1", "10.1.0.5", "fd00:1::5")}, ""},
		}
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			cache, searched := t.TempDir(), t.TempDir()
			write := func(path, content string) {
				t.Helper()
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			place := func(s string) string { return strings.Replace(s, "NETNS", searched, 1) }
			for file, content := range tc.entries {
				write(filepath.Join(cache, "results", file), place(content))
			}
			for path := range tc.holding {
				if strings.HasPrefix(path, "NETNS") {
					write(place(path), "")
				}
			}
			a := New(Config{Cache: Cache{
				Dir: cache, NetnsDirs: []string{filepath.Join(t.TempDir(), "none"), searched}, ParsePod: podOf,
				Chained:   func() ([]string, error) { return []string{"net"}, nil },
				HasPlugin: func(config []byte) bool { return strings.Contains(string(config), "kube2iam-cni") },
			}}, System{
				System: attach.System{HasIPv6: func() bool { return true }},
				HostSide: func(path, _ string) string {
					switch {
					case strings.HasSuffix(path, "of-another-link"):
						return "veth9"
					case strings.HasSuffix(path, "replaced"):
						return ""
					}
					return hostLink
				},
				Addresses: func(path, ifName string) ([]netip.Addr, error) {
					if held := tc.holding[strings.Replace(path, searched, "NETNS", 1)]; ifName == "eth0" && held != "" {
						return []netip.Addr{netip.MustParseAddr(held)}, nil
					}
					return nil, nil
				},
			}, slog.New(slog.DiscardHandler))
			found, err := a.findUnattached(nil)
			var got []attach.Request
			for _, f := range found {
				got = append(got, f.Request)
			}
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("got the error %v, want %q", err, tc.err)
			}
			slices.SortFunc(got, func(a, b attach.Request) int { return strings.Compare(a.ContainerID, b.ContainerID) })
			for i := range got {
				got[i].Netns = strings.Replace(got[i].Netns, searched, "NETNS", 1)
			}
			if diff := cmp.Diff(tc.requests, got, addresses, cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}
		})
	}
}
