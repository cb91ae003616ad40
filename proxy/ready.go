package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/pflag"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
)

const readyUsage = "tell whether the proxy of this container serves the node's pods: it has taken over from the one before"

// ready is the startup probe: `kube2iam-proxy ready`. It ends with 0 where the proxy of its container serves, and with 1 otherwise. A probe
// of the admin port cannot tell two proxies apart that are on the same host network, and the old one's answer would have the kubelet end it
// before the new one has taken over.
func ready(ctx context.Context, args []string, stdout io.Writer) error {
	f := pflag.NewFlagSet("ready", pflag.ContinueOnError)
	f.Usage = func() {}
	stateDir := f.String("state-dir", cmp.Or(os.Getenv("KUBE2IAM_STATE_DIR"), defaultStateDir), "the proxy's --state-dir: `DIR`")
	switch err := f.Parse(args); {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Fprintf(stdout, "kube2iam-proxy ready - %s\n\nIt ends with 0 where it does, and with 1 otherwise.\n\n%s", readyUsage, f.FlagUsages())
		return nil
	case err != nil:
		return &usageError{err}
	case f.NArg() > 0:
		return &usageError{fmt.Errorf("ready: unexpected argument %q", f.Arg(0))}
	}
	here, err := handover.IsHere(ctx, handoverSocket(*stateDir))
	if err != nil {
		return err
	}
	if !here {
		return errors.New("no proxy of this container serves yet")
	}
	fmt.Fprintln(stdout, "ready")
	return nil
}
