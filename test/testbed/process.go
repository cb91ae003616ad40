package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// Process is a program that runs in a namespace of the testbed until it is stopped or the testbed
// is closed.
type Process struct {
	name string
	cmd  *exec.Cmd
	log  *log
	done chan struct{}
	err  error // the result of Wait, valid once done is closed
}

// startProcess starts a program in the namespace with exactly this environment.
func startProcess(n *netnstest.Namespace, env []string, name string, args ...string) (*Process, error) {
	p := &Process{name: filepath.Base(name), log: &log{}, done: make(chan struct{})}
	err := n.Do(func() error {
		p.cmd = exec.Command(name, args...)
		p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = env, p.log, p.log
		// A child of the program may keep its output open after the program has ended.
		p.cmd.WaitDelay = time.Second
		// If this process is killed, the kernel kills the program.
		p.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		return p.cmd.Start()
	})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID returns the process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Log returns the standard output and standard error so far.
func (p *Process) Log() string { return p.log.String() }

// stopWait is how long a process may take to end after SIGTERM.
const stopWait = 10 * time.Second

// Stop sends SIGTERM and waits for the process. A process that needs SIGKILL, or ends with another
// status than 0, is an error. A process that has ended before is none.
func (p *Process) Stop() error {
	select {
	case <-p.done:
		return nil
	default:
	}
	p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.done:
		if p.err != nil {
			return fmt.Errorf("stop %s: %w: %s", p.name, p.err, p.log.tail())
		}
		return nil
	case <-time.After(stopWait):
		p.Kill()
		return fmt.Errorf("stop %s: still there %s after SIGTERM: %s", p.name, stopWait, p.log.tail())
	}
}

// Kill ends the process with SIGKILL.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// Ended returns an error with the exit status and the log if the process has ended, else nil.
func (p *Process) Ended() error {
	select {
	case <-p.done:
	default:
		return nil
	}
	return fmt.Errorf("%s has ended: %w: %s", p.name, errors.Join(errors.New("exit"), p.err), p.log.tail())
}

// log collects the output of a process.
type log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// tail returns the last lines, for an error.
func (l *log) tail() string {
	lines := strings.Split(strings.TrimSpace(l.String()), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// await calls ready until it succeeds. It fails when the context ends or the process does.
func (p *Process) await(ctx context.Context, ready func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-p.done:
			return p.Ended()
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w: %w: %s", p.name, ctx.Err(), err, p.log.tail())
		}
	}
}
