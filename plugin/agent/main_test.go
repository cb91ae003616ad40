package main

import (
	"bytes"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// TestMain runs the agent if a test started this binary with agentEnv.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_AS_AGENT") != "" {
		main()
	}
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	pluginDir = dir
	code := netnstest.Run(m)
	os.RemoveAll(dir)
	os.Exit(code)
}

// pluginDir is the directory in which buildPlugin builds the plugin.
var pluginDir string

type outcome struct {
	Code           int
	Stdout, Stderr string
}

// runBinary runs the agent in another process.
func runBinary(t *testing.T, env []string, args ...string) outcome {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return outcomeOf(t, exec.Command(self, args...), append(env, agentEnv(t)...), nil)
}

// agentEnv makes this test binary run the agent, without the second by which the race detector
// delays an exit.
func agentEnv(t *testing.T) []string {
	return []string{"TEST_AS_AGENT=1", "GORACE=atexit_sleep_ms=0", "GOCOVERDIR=" + t.TempDir()}
}

func outcomeOf(t *testing.T, cmd *exec.Cmd, env []string, stdin []byte) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, bytes.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

var buildPlugin = sync.OnceValues(func() (string, error) {
	path := filepath.Join(pluginDir, pluginName)
	build := exec.Command("go", "build", "-o", path, "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stderr = os.Stderr
	return path, build.Run()
})

func TestProgram(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		code int
		text string
	}{
		"no argument":     {nil, 0, "run|install|uninstall|ready"},
		"help":            {[]string{"--help"}, 0, "run|install|uninstall|ready"},
		"version":         {[]string{"--version"}, 0, "kube2iam-agent unknown (commit unknown, built unknown)"},
		"unknown command": {[]string{"agents"}, 1, `unknown command "agents"`},
		"run":             {[]string{"run", "--help"}, 0, "install, guard, adopt, repair and collect"},
		"backend":         {[]string{"run", "--backend", "ipvs"}, 1, `backend: "ipvs" is not`},
		"mark":            {[]string{"run", "--mark", "0"}, 1, `mark: "0" is not`},
		"interval":        {[]string{"run", "--interval", "1ms"}, 1, "--interval 1ms"},
		"argument":        {[]string{"run", "now"}, 1, `unexpected argument "now"`},
		"unknown flag":    {[]string{"--what"}, 1, "what"},
	} {
		t.Run(name, func(t *testing.T) {
			got := runBinary(t, nil, tc.args...)
			if got.Code != tc.code || !strings.Contains(got.Stdout+got.Stderr, tc.text) {
				t.Errorf("got %+v, want exit status %d and %q", got, tc.code, tc.text)
			}
		})
	}
}
