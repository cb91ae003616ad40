package redirect

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockSeconds bounds the wait for the xtables lock; iptables and go-iptables wait without limit unless told.
const lockSeconds = 5

// runLimit bounds one run of a command: the wait for the lock, and what it takes to read and write the largest of tables.
const runLimit = 60 * time.Second

// resourceProblem is iptables' exit status where it could not have the lock (xtables.h, RESOURCE_PROBLEM).
const resourceProblem = 4

// script is the input of iptables-restore: lines of several tables, each of which is changed at once or not at all. It takes
// every option of iptables, "-C" too: so one run checks the base and adds or deletes rules, and fails as a whole where
// something that it relies on is missing. The tables come in the order of first use.
type script struct {
	tables []string
	lines  map[string][]string
	err    error // of a rule that was not added
}

// add adds a line. A rule with a word that iptables-restore would read as several, or as another line, makes the whole script
// fail: words come from records and from the kernel's rules, which another program may have written.
func (s *script) add(option string, r rule) {
	for _, word := range append([]string{option, r.table, r.chain}, r.spec...) {
		if !isWord(word) {
			s.err = cmp.Or(s.err, fmt.Errorf("rule in chain %q: %.80q is not a plain word", r.chain, word))
			return
		}
	}
	if s.lines == nil {
		s.lines = make(map[string][]string)
	}
	if s.lines[r.table] == nil {
		s.tables = append(s.tables, r.table)
	}
	s.lines[r.table] = append(s.lines[r.table], option+" "+r.chain+" "+strings.Join(r.spec, " "))
}

// isWord reports whether s is visible ASCII without quotes and backslashes.
func isWord(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || c == '"' || c == '\'' || c == '\\' {
			return false
		}
	}
	return s != ""
}

func (s *script) String() string {
	var b strings.Builder
	for _, table := range s.tables {
		fmt.Fprintf(&b, "*%s\n%s\nCOMMIT\n", table, strings.Join(s.lines[table], "\n"))
	}
	return b.String()
}

// restore runs a script. The error is ErrBusy where the lock could not be had.
func (t *IPTables) restore(ctx context.Context, v6 bool, s *script) error {
	if len(s.tables) == 0 || s.err != nil {
		return s.err
	}
	command, err := t.find(t.form, v6)
	if err != nil {
		return err
	}
	_, err = run(ctx, s.String(), command+"-restore", "--noflush", "--wait", fmt.Sprint(lockSeconds))
	return err
}

// run runs a command of iptables. It dies with the thread that started it, so that no killed plugin's command goes on: which
// is why the thread is kept.
func run(ctx context.Context, stdin, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, runLimit)
	defer cancel()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	if err == nil {
		return stdout.String(), nil
	}
	err = fmt.Errorf("%s: %w: %s", path, err, firstLine(stderr.String()))
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == resourceProblem || ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return "", err
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line[:min(len(line), 300)]
}
