// Command kube2iam-proxy serves the credentials of AWS IAM roles to the pods of a node, over the
// EC2 metadata protocol.
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

// The exit codes distinguish a configuration that cannot work from a failure that a restart may
// resolve.
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
		switch args[0] {
		case "ready", "live":
			return probe(ctx, args[0], args[1:], stdout)
		case "--version", "-v":
			fmt.Fprintf(stdout, "kube2iam-proxy %s (commit %s, built %s)\n", version, commit, date)
			return nil
		}
	}
	o, err := parseOptions(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		help(stdout)
		return nil
	case err != nil:
		return &usageError{err}
	}
	log := logger(o, stderr)
	klog.SetSlogLogger(log) // client-go's lines, in our format
	return serve(ctx, o, log)
}

// usageError is a mistake in flags or environment.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

func logger(o *options, w io.Writer) *slog.Logger {
	handler := &slog.HandlerOptions{Level: o.level}
	if o.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, handler))
	}
	return slog.New(slog.NewTextHandler(w, handler))
}
