package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// TestMain makes the test binary the plugin's where a test runs it as such.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_AS_PLUGIN") != "" {
		main()
	}
	netnstest.Main(m)
}

type outcome struct {
	Code           int
	Stdout, Stderr string
}

// binary runs the plugin's binary with an environment of its own.
func binary(t *testing.T, stdin []byte, env []string, args ...string) outcome {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(self, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	// The race detector holds a process for a second at its end unless told not to.
	cmd.Env = append(env, "TEST_AS_PLUGIN=1", "GORACE=atexit_sleep_ms=0", "GOCOVERDIR="+t.TempDir())
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

func TestVersionCommand(t *testing.T) {
	got := binary(t, nil, []string{"CNI_COMMAND=VERSION"})
	want := outcome{0, `{"cniVersion":"1.1.0","supportedVersions":["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}` + "\n", ""}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestCommands sends each command through skel to its callback, in processes of their own.
func TestCommands(t *testing.T) {
	n := newNode(t, "routed", "auto")
	args := n.Args("c1", n.Pod, pod4)
	env := []string{
		"PATH=" + n.Commands, "XTABLES_LOCKFILE=" + os.Getenv("XTABLES_LOCKFILE"),
		"CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_NETNS=" + args.Netns, "CNI_ARGS=" + args.Args,
	}
	command := func(name string, stdin []byte, want outcome) {
		t.Helper()
		if diff := cmp.Diff(want, binary(t, stdin, append(env, "CNI_COMMAND="+name))); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	fails := func(name string, stdin []byte, code uint, msg string) {
		t.Helper()
		got := binary(t, stdin, append(env, "CNI_COMMAND="+name))
		var e types.Error
		if err := json.Unmarshal([]byte(got.Stdout), &e); err != nil || got.Code != 1 || e.Code != code || !strings.Contains(e.Msg, msg) {
			t.Errorf("%s: got %+v, want code %d and %q", name, got, code, msg)
		}
	}
	success := outcome{}

	command("STATUS", n.Conf(nil), success)
	fails("STATUS", n.Conf(map[string]any{"backend": "x"}), types.ErrInvalidNetworkConfig, "backend")
	fails("CHECK", args.StdinData, codeCheck, "no record")
	fails("ADD", n.Conf(map[string]any{"what": 1}), types.ErrInvalidNetworkConfig, `"what"`)
	fails("ADD", n.Conf(map[string]any{"cniVersion": "9.0.0"}), types.ErrIncompatibleCNIVersion, "")
	if state := n.State(); len(state) > 0 {
		t.Errorf("left %v", state)
	}

	got := binary(t, args.StdinData, append(env, "CNI_COMMAND=ADD"))
	if got.Code != 0 || got.Stderr != "" {
		t.Fatalf("ADD: %+v", got)
	}
	if diff := cmp.Diff(decode(t, args.StdinData).(map[string]any)["prevResult"], decode(t, []byte(got.Stdout))); diff != "" {
		t.Errorf("ADD: %s", diff)
	}
	if len(n.Redirections()) != 1 {
		t.Errorf("after ADD: %v", n.Redirections())
	}
	command("CHECK", args.StdinData, success)
	command("DEL", args.StdinData, success)
	command("DEL", n.Conf(nil), success)
	if len(n.Redirections()) > 0 || len(n.State()) > 0 {
		t.Errorf("after DEL: %v, %v", n.Redirections(), n.State())
	}
	n.Must(n.add(args))
	command("GC", n.Conf(map[string]any{"cni.dev/valid-attachments": nil}), success)
	if len(n.Redirections()) > 0 || len(n.State()) > 0 {
		t.Errorf("after GC: %v, %v", n.Redirections(), n.State())
	}
}

func TestExplain(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		code int
		text string
	}{
		"no argument":      {nil, 0, "chained CNI plugin"},
		"help":             {[]string{"--help"}, 0, "chained CNI plugin"},
		"version":          {[]string{"--version"}, 0, "kube2iam-cni unknown (commit unknown, built unknown)"},
		"an agent command": {[]string{"install"}, 1, `unknown argument "install"; kube2iam-agent has`},
		"unknown flag":     {[]string{"--what"}, 1, "--what"},
	} {
		t.Run(name, func(t *testing.T) {
			got := binary(t, nil, nil, tc.args...)
			if got.Code != tc.code || !strings.Contains(got.Stdout+got.Stderr, tc.text) {
				t.Errorf("got %+v, want exit status %d and %q", got, tc.code, tc.text)
			}
		})
	}
}
