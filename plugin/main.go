// Command kube2iam-cni is a chained CNI plugin that redirects a pod's requests to the EC2 metadata service to the node's
// kube2iam-proxy, which answers with the credentials of the pod's own role.
//
// With CNI_COMMAND set it is the plugin; without, a program that explains itself.
package main

import (
	"fmt"
	"log/slog"
	"os"
	"runtime"

	"github.com/containernetworking/cni/pkg/skel"
	cni "github.com/containernetworking/cni/pkg/version"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
)

// What was built, set by -ldflags "-X main.version=…".
var (
	version = "unknown"
	commit  = "unknown"
	date    = "unknown"
)

func main() { os.Exit(run(os.Args)) }

func run(args []string) int {
	if os.Getenv("CNI_COMMAND") != "" {
		return runPlugin()
	}
	if err := program().Run(args); err != nil {
		fmt.Fprintf(os.Stderr, "kube2iam-cni: %v\n", err)
		return 1
	}
	return 0
}

func runPlugin() int {
	// It does one thing after another, most of them a question to the kernel: a second processor only makes each answer wait
	// for another thread to wake. (What waits in a system call leaves its processor to others all the same.)
	runtime.GOMAXPROCS(1)
	if os.Getenv("CNI_PATH") == "" {
		// skel demands it of every command, the specification of none but those that call other plugins. This one does not.
		os.Setenv("CNI_PATH", "/")
	}
	p := &plugin{System: node.Host(), stdout: os.Stdout, log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	// Each callback is set: skel takes a missing one for success.
	callbacks := skel.CNIFuncs{Add: p.add, Del: p.del, Check: p.check, GC: p.gc, Status: p.status}
	if err := skel.PluginMainFuncsWithError(callbacks, cni.All, about()); err != nil {
		if err := err.Print(); err != nil {
			fmt.Fprintf(os.Stderr, "kube2iam-cni: %v\n", err)
		}
		return 1
	}
	return 0
}

func about() string { return "CNI plugin kube2iam-cni " + version }
