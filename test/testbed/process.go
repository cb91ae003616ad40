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
)

// Process is a program that runs in a namespace of the testbed, until it is stopped or the testbed is closed.
type Process struct {
	name string
	cmd  *exec.Cmd
	log  *log
	done chan struct{}
	err  error // why it ended, once done is closed
}

// startProcess starts a program in the namespace, with this environment and no other.
func startProcess(n *Netns, env []string, name string, args ...string) (*Process, error) {
	p := &Process{name: filepath.Base(name), log: &log{}, done: make(chan struct{})}
	err := n.Do(func() error {
		p.cmd = exec.Command(name, args...)
		p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = env, p.log, p.log
		// What the program itself has started may hold its output open for longer than it lives.
		p.cmd.WaitDelay = time.Second
		// Should this process be killed, nobody is left to stop the other.
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

// PID is the process's ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended, by itself or not.
func (p *Process) Done() <-chan struct{} { return p.done }

// Log is what it wrote so far, standard output and standard error in one.
func (p *Process) Log() string { return p.log.String() }

// stopWait is how long a process may take to end in order.
const stopWait = 10 * time.Second

// Stop sends SIGTERM and waits for the end; SIGKILL follows where it takes too long, which is an error, as is any other
// exit status than 0. A process that ended before is no error.
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

// Kill ends the process at once, as a crash does.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// Ended is why the process is not running, nil while it is.
func (p *Process) Ended() error {
	select {
	case <-p.done:
	default:
		return nil
	}
	return fmt.Errorf("%s has ended: %w: %s", p.name, errors.Join(errors.New("exit"), p.err), p.log.tail())
}

// log is what a process writes.
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

// tail is the last lines, for an error.
func (l *log) tail() string {
	lines := strings.Split(strings.TrimSpace(l.String()), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// await tries until ready succeeds. It fails with the context, or when the process ends first.
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
