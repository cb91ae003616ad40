package netns

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// killPoints are the system calls at which an ADD or a DEL is killed: those that change or read
// files, locks, netlink and its commands.
var killPoints = []string{"mkdirat", "flock", "write", "renameat", "linkat", "unlinkat", "sendto", "sendmsg", "execve", "waitid"}

// kill is the n-th call of one kind in one of the plugin's threads or commands. The zero value
// kills nothing.
type kill struct {
	call string
	n    int
}

func (k kill) String() string { return fmt.Sprintf("its %s %d", k.call, k.n) }

// runPlugin runs the plugin, kills it at a call, and reports whether it was killed.
func (n *node) runPlugin(command string, s *testbed.Sandbox, at kill) (killed bool) {
	n.t.Helper()
	built, err := tools()
	n.must(err)
	plugin, err := built.Path("kube2iam-cni")
	n.must(err)
	conf := map[string]any{"cniVersion": "1.1.0", "name": testbed.Network, "prevResult": s.Result}
	for key, value := range testbed.Kube2IAM(n.backend) {
		conf[key] = value
	}
	conf["stateDir"] = n.StateDir
	stdin, err := json.Marshal(conf)
	n.must(err)
	var out bytes.Buffer
	err = n.Node.Do(func() error {
		cmd := exec.CommandContext(n.t.Context(), plugin)
		if at != (kill{}) {
			cmd = exec.CommandContext(n.t.Context(), "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+at.call,
				"-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", at.call, at.n), plugin)
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &out
		cmd.Env = append(n.ClientEnv(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+s.ContainerID, "CNI_NETNS="+s.Netns.Path(), "CNI_IFNAME=eth0",
			"CNI_PATH="+filepath.Dir(plugin), "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE="+s.Namespace+";K8S_POD_NAME="+s.Name+";K8S_POD_UID="+s.UID)
		return cmd.Run()
	})
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false
	case at == (kill{}) || !errors.As(err, &exit):
		n.t.Fatalf("%s: %v: %s", command, err, &out)
	}
	return true // or a command of the plugin's was, and it says that it failed
}

// wantOwnOrNone wants the pod to get its own role's credentials or none.
func (n *node) wantOwnOrNone(s *testbed.Sandbox, role string) {
	n.t.Helper()
	switch got := n.getSoon(s, credentials+role); {
	case got.err != nil, got.status != 200:
		// refused, or not known: none
	default:
		n.wantSession(s, role, got)
	}
}

// TestKilled kills the plugin at each boundary of an ADD and of a DEL in turn. The pod is safe at
// once. The next ADD, the next DEL, the agent's next round, and the ADD of another pod with the
// address each leave rules and records as if the plugin had not been killed.
func TestKilled(t *testing.T) {
	onThese(t, []setup{bridgeIPTables, bridged, routedIPTables}, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		chain := n.SetChain()
		pod := n.run("pod", "app")
		n.SetChain(chain...)
		neighbour := n.run("neighbour", "other")
		without := n.snapshot()
		n.runPlugin("ADD", pod, kill{})
		with := n.snapshot()
		n.wantOwn(pod, "app")
		n.runPlugin("DEL", pod, kill{})
		next := *pod // another container on the same interface, so with the same address
		next.Name, next.UID, next.ContainerID = "next", "next", strings.Repeat("f", 64)
		n.runPlugin("ADD", &next, kill{})
		withNext := n.snapshot()
		n.runPlugin("DEL", &next, kill{})
		same := func(when string, want string) {
			t.Helper()
			if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(n.snapshot(), "\n")); diff != "" {
				t.Errorf("%s (-want +got):\n%s", when, diff)
			}
		}
		same("after an ADD and a DEL", without)
		ways := map[string]func(when string){
			"ADD": func(when string) {
				n.runPlugin("ADD", pod, kill{})
				same(when+", then ADD", with)
			},
			"DEL": func(when string) {
				n.runPlugin("DEL", pod, kill{})
				same(when+", then DEL", without)
			},
			"a round": func(when string) {
				n.round()
				if state := n.snapshot(); state != with && state != without {
					t.Errorf("%s, then a round: neither attached nor detached:\n%s", when, cmp.Diff(strings.Split(with, "\n"), strings.Split(state, "\n")))
				}
				n.runPlugin("ADD", pod, kill{})
				same(when+", then a round and ADD", with)
			},
			"ADD of another pod": func(when string) {
				n.runPlugin("ADD", &next, kill{})
				same(when+", then ADD of another pod", withNext)
				n.runPlugin("DEL", &next, kill{})
				same(when+", then ADD and DEL of another pod", without)
			},
		}
		for _, command := range []string{"ADD", "DEL"} {
			kills, between := 0, 0
			for way := range ways {
				calls := killPoints
				if way == "ADD of another pod" {
					calls = []string{"renameat", "linkat", "unlinkat"} // they change which record holds the address
				}
				for _, call := range calls {
					// Until one lives to its end twice: threads share the work differently each time.
					for at, lived := (kill{call, 1}), 0; lived < 2 && at.n < 50; at.n++ {
						if command == "DEL" {
							n.runPlugin("ADD", pod, kill{})
						} else {
							n.runPlugin("DEL", pod, kill{})
						}
						if !n.runPlugin(command, pod, at) {
							lived++
							continue
						}
						kills++
						if state := n.snapshot(); state != with && state != without {
							between++
						}
						when := fmt.Sprintf("%s killed at %s", command, at)
						n.wantOwnOrNone(pod, "app")
						ways[way](when)
						if t.Failed() {
							t.FailNow()
						}
					}
				}
			}
			t.Logf("%s was killed %d times, %d of them with part of it done", command, kills, between)
			if kills < 15 || between == 0 {
				t.Error("that is no test of what is left")
			}
		}
		n.wantOwn(neighbour, "other")
	})
}

// snapshot returns rules and records, sorted.
func (n *node) snapshot() string {
	n.t.Helper()
	return strings.Join(append(sortedLines(n.rules()), n.records()...), "\n")
}
