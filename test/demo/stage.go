package main

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// stage is the testbed of the demo and its output.
type stage struct {
	out       io.Writer
	bed       *testbed.Bed
	step      int
	surprises int
	failed    error // why the demo stops: it was interrupted, or its output is closed

	one, two, three *testbed.Sandbox
}

func (s *stage) title(format string, args ...any) {
	s.printf("\n%d. %s\n\n", s.step, fmt.Sprintf(format, args...))
	s.step++
}

func (s *stage) text(format string, args ...any) {
	s.printf("   "+format+"\n", args...)
}

func (s *stage) printf(format string, args ...any) {
	if s.failed == nil {
		_, s.failed = fmt.Fprintf(s.out, format, args...)
	}
}

func (s *stage) block(text string) {
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		s.printf("     %s\n", line)
	}
}

// expect prints whether the step showed the expected result. If not, the demo fails at its end.
func (s *stage) expect(holds bool, what string) {
	if holds {
		s.printf("   ✓ %s\n", what)
		return
	}
	s.surprises++
	s.printf("   ✗ NOT SO: %s\n", what)
}

// curl shows a command in the pod and its output, with shortened secrets.
func (s *stage) curl(ctx context.Context, pod *testbed.Sandbox, args ...string) string {
	s.printf("   %s $ curl %s\n", pod.Name, shown(args))
	out, err := pod.Netns.Run(ctx, s.bed.ClientEnv(), "curl", append([]string{"-sS", "--max-time", "5", "-w", "\nHTTP %{http_code}"}, args...)...)
	if ctx.Err() != nil {
		s.failed = ctx.Err()
		return ""
	}
	if err != nil {
		out = "curl: " + tail(err)
	}
	s.block(secrets.ReplaceAllString(headings.ReplaceAllString(out, "$1"), `$1 : "$2…"`))
	return out
}

var (
	secrets  = regexp.MustCompile(`("SecretAccessKey"|"Token") : "(.{4})[^"]*"`)
	headings = regexp.MustCompile(`(?s)<\?xml.*<h1>(.*)</h1>.*</html>\n`)
)

func shown(args []string) string {
	quoted := make([]string, len(args))
	for i, a := range args {
		if strings.HasPrefix(a, "X-aws-ec2-metadata-token: ") {
			a = "X-aws-ec2-metadata-token: $TOKEN"
		}
		if strings.ContainsAny(a, " $") {
			a = `"` + a + `"`
		}
		quoted[i] = a
	}
	return strings.Join(quoted, " ")
}

// tail returns the last line of an error, which is curl's message.
func tail(err error) string {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	last := lines[len(lines)-1]
	if _, says, ok := strings.Cut(last, "curl: "); ok {
		return says
	}
	return last
}
