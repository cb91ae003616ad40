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

	"github.com/urfave/cli/v2"
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
	cli.VersionPrinter = func(c *cli.Context) {
		fmt.Fprintf(c.App.Writer, "kube2iam-proxy %s (commit %s, built %s)\n", version, commit, date)
	}
	app := &cli.App{
		Name:            "kube2iam-proxy",
		Usage:           "gives each pod of this node the credentials of its own IAM role, and no other",
		Description:     description,
		Version:         version,
		Flags:           flags(),
		Commands:        []*cli.Command{readyCommand(stdout)},
		HideHelpCommand: true,
		// A regular expression may hold a comma.
		DisableSliceFlagSeparator: true,
		Writer:                    stdout,
		ErrWriter:                 stderr,
		ExitErrHandler:            func(*cli.Context, error) {}, // the exit code is chosen here, in one place
		OnUsageError:              func(_ *cli.Context, err error, _ bool) error { return &usageError{err} },
		Action: func(c *cli.Context) error {
			o, err := parse(c)
			if err != nil {
				return &usageError{err}
			}
			log := logger(o, stderr)
			klog.SetSlogLogger(log) // client-go's lines, in our format
			return serve(c.Context, o, log)
		},
	}
	err := app.RunContext(ctx, args)
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

// usageError is a mistake in flags or environment.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

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
