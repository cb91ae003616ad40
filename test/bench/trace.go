package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// trace runs a program and writes the names of all programs that it and its descendants execute to
// a file, one a line. It returns the program's exit status. The kernel reports each execve
// (ptrace(2), PTRACE_O_TRACEEXEC), so even a program that ends immediately is counted.
func trace(file string, args []string, stderr io.Writer) int {
	status, err := traced(file, args)
	if err != nil {
		fmt.Fprintln(stderr, "trace:", err)
		return 1
	}
	return status
}

func traced(file string, args []string) (status int, err error) {
	out, err := os.Create(file)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	runtime.LockOSThread() // the tracer is a thread, not a process
	pid, err := syscall.ForkExec(args[0], args, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Ptrace: true},
	})
	if err != nil {
		return 0, fmt.Errorf("%s: %w", args[0], err)
	}
	var state unix.WaitStatus
	if _, err := unix.Wait4(pid, &state, 0, nil); err != nil {
		return 0, err
	}
	const options = unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(pid, options); err != nil {
		return 0, fmt.Errorf("ptrace %s: %w", args[0], err)
	}
	for at := pid; ; {
		if state.Stopped() {
			// A process that was killed cannot continue. The next Wait4 reports its end.
			if err := unix.PtraceCont(at, int(passedOn(state))); err != nil && !errors.Is(err, unix.ESRCH) {
				return 0, fmt.Errorf("ptrace %s: %w", args[0], err)
			}
		}
		if at, err = unix.Wait4(-1, &state, unix.WALL, nil); err != nil {
			return 0, err
		}
		switch {
		case at == pid && state.Exited():
			return state.ExitStatus(), nil
		case at == pid && state.Signaled():
			return 0, fmt.Errorf("%s: %s", args[0], state.Signal())
		case state.Stopped() && state.TrapCause() == unix.PTRACE_EVENT_EXEC:
			fmt.Fprintln(out, calledAs(at))
		}
	}
}

// passedOn returns the signal to deliver to a stopped process: none if the tracer caused the stop.
// Every new process and thread stops with SIGSTOP.
func passedOn(state unix.WaitStatus) unix.Signal {
	if s := state.StopSignal(); s != unix.SIGTRAP && s != unix.SIGSTOP {
		return s
	}
	return 0
}

func calledAs(pid int) string {
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	name, _, _ := bytes.Cut(line, []byte{0})
	return string(name)
}

// readTrace returns the names that trace has written.
func readTrace(file string) ([]string, error) {
	data, err := os.ReadFile(file)
	return strings.Fields(string(data)), err
}
