// Command kube2iam-cni is a chained CNI plugin. It redirects a pod's requests for the EC2 metadata
// service to the node's kube2iam-proxy, which answers with the credentials of the pod's own role.
package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	cni "github.com/containernetworking/cni/pkg/version"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
)

// The build sets these by -ldflags "-X main.version=…".
var (
	version = "unknown"
	commit  = "unknown"
	date    = "unknown"
)

func main() {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(runPlugin())
	}
	os.Exit(explain(os.Args[1:], os.Stdout, os.Stderr))
}

// runPlugin runs the command that the container runtime asks for by CNI_COMMAND, and returns the
// exit status.
func runPlugin() int {
	// The plugin makes one system call after another. With a second processor, each answer of the
	// kernel would wait until another thread wakes up.
	runtime.GOMAXPROCS(1)
	if os.Getenv("CNI_PATH") == "" {
		// skel requires CNI_PATH for every command. The CNI specification requires it only of
		// plugins that call other plugins, which this one does not do.
		os.Setenv("CNI_PATH", "/")
	}
	p := &plugin{System: attach.Host(), stdout: os.Stdout, log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	// skel reports success for a callback that is nil.
	callbacks := skel.CNIFuncs{Add: p.add, Del: p.del, Check: p.check, GC: p.gc, Status: p.status}
	if err := skel.PluginMainFuncsWithError(callbacks, cni.All, "CNI plugin kube2iam-cni "+version); err != nil {
		if err := err.Print(); err != nil {
			fmt.Fprintf(os.Stderr, "kube2iam-cni: %v\n", err)
		}
		return 1
	}
	return 0
}

// explain tells a person who runs the plugin by hand what it is, and returns the exit status.
func explain(args []string, stdout, stderr io.Writer) int {
	for _, arg := range args {
		if !slices.Contains([]string{"-h", "--help", "-v", "--version"}, arg) {
			fmt.Fprintf(stderr, "kube2iam-cni: unknown argument %q; kube2iam-agent has the commands install, uninstall, run and ready\n", arg)
			return 1
		}
	}
	fmt.Fprintf(stdout, `kube2iam-cni %s (commit %s, built %s)

kube2iam-cni is a chained CNI plugin that gives each pod the AWS credentials of its own role. The
container runtime runs it with CNI_COMMAND set, as an entry of a network configuration list says.
kube2iam-agent installs it and adds the entry: see kube2iam-agent --help.
`, version, commit, date)
	return 0
}
