// Command kube2iam-proxy vends the credentials of AWS IAM roles to the pods of one node, over the EC2 metadata protocol.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"
)

// Set at build time by -ldflags -X.
var (
	version = "unknown"
	commit  = "unknown"
	date    = "unknown"
)

func main() { os.Exit(run(os.Args, os.Stdout, os.Stderr)) }

// The exit codes: a configuration that cannot work is told from a failure that a restart may mend.
const (
	exitFailure = 1
	exitUsage   = 2
)

func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	err := command(ctx, args[1:], stdout, stderr)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "kube2iam-proxy: %v\n", err)
	if _, ok := errors.AsType[*usageError](err); ok {
		fmt.Fprintln(stderr, "kube2iam-proxy --help tells what each flag takes")
		return exitUsage
	}
	return exitFailure
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 0 {
		if _, ok := probeCommands[args[0]]; ok {
			return probe(ctx, args[0], args[1:], stdout)
		}
	}
	f := flags()
	switch err := f.parse(args); {
	case errors.Is(err, pflag.ErrHelp):
		f.help(stdout)
		return nil
	case err != nil:
		return &usageError{err}
	case f.is("version"):
		fmt.Fprintf(stdout, "kube2iam-proxy %s (commit %s, built %s)\n", version, commit, date)
		return nil
	}
	o, err := parse(f)
	if err != nil {
		return &usageError{err}
	}
	log := logger(o, stderr)
	klog.SetSlogLogger(log) // client-go's lines, in our format
	return serve(ctx, o, log)
}

// usageError is a mistake in flags or environment.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

const summary = "gives each pod of this node the credentials of its own IAM role, and no other"

const description = `It runs on every node, on the host's network, beside the CNI plugin kube2iam-cni, which redirects the pods' requests for
169.254.169.254:80 to it. A pod's annotation names its role:

   iam.amazonaws.com/role: my-role

Every flag of kube2iam is understood. Each can be given in the environment too, as KUBE2IAM_ and its name in capitals
(KUBE2IAM_BASE_ROLE_ARN). The node's own AWS credentials come from the SDK's default chain; they need sts:AssumeRole.

In a pod, the API server is found by itself; elsewhere, name a kubeconfig:

   kube2iam-proxy --node "$NODE_NAME" --kubeconfig FILE --base-role-arn arn:aws:iam::123456789012:role/pods/`

func logger(o *options, w io.Writer) *slog.Logger {
	level := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}[o.logLevel]
	if o.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}
