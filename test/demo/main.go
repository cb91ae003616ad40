// Command demo shows kube2iam-cni at work, step by step, on a node and pods in network namespaces
// that it makes and removes.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

func main() { os.Exit(run(os.Stdout)) }

func run(out io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	s := &stage{out: out}
	err := show(ctx, s)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "\ninterrupted; the namespaces and processes of the demo are gone")
		return 130
	case err != nil:
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		return 1
	}
	return 0
}

func show(ctx context.Context, s *stage) (err error) {
	s.title("Building the two programs, the real CNI plugins and AWS's metadata mock (a few minutes the first time)")
	tools, err := testbed.BuildTools(ctx, false)
	if err != nil {
		return err
	}
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "bridge"})
	if err != nil {
		return err
	}
	defer func() {
		closed := bed.Close()
		if err == nil && closed == nil && ctx.Err() == nil {
			s.text("The namespaces, the processes and the state directory of this demo are gone.")
		}
		err = errors.Join(err, closed)
	}()
	s.bed = bed
	for _, act := range []func(context.Context, *stage) error{problem, setUp, pods, ownRole, otherRole, noRole, directDial, removal} {
		if err := act(ctx, s); err != nil {
			return err
		}
		if s.failed != nil {
			return s.failed
		}
	}
	if s.surprises > 0 {
		return fmt.Errorf("%d steps did not show what they should", s.surprises)
	}
	return nil
}
