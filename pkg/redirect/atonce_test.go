package redirect

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// atOnce has processes of their own add attachments to this namespace, each its own and one after the other.
func (n *namespace) atOnce(processes ...[]Attachment) {
	n.Helper()
	var started []*exec.Cmd
	for _, attachments := range processes {
		var lines []string
		for _, a := range attachments {
			line := []string{a.ID, a.HostLink}
			for _, r := range a.Redirections {
				line = append(line, r.Source.String())
			}
			lines = append(lines, strings.Join(line, " "))
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestAddsOfOneProcess$")
		// The race detector holds a process for a second at its end unless told not to.
		cmd.Env = append(os.Environ(), "ADD_ATTACHMENTS="+strings.Join(lines, "\n"), "GORACE=atexit_sleep_ms=0")
		cmd.Stdout, cmd.Stderr = new(strings.Builder), new(strings.Builder)
		n.must(cmd.Start())
		started = append(started, cmd)
	}
	for _, cmd := range started {
		if err := cmd.Wait(); err != nil {
			n.Errorf("%v\n%s%s", err, cmd.Stdout, cmd.Stderr)
		}
	}
}

// TestAddsOfOneProcess is not a test of this process.
func TestAddsOfOneProcess(t *testing.T) {
	lines := os.Getenv("ADD_ATTACHMENTS")
	if lines == "" {
		t.Skip("it is one of those that TestNFTablesAtOnce starts")
	}
	for line := range strings.SplitSeq(lines, "\n") {
		words := strings.Fields(line)
		n := new(Node)
		b, err := n.Backend(NFTables)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Add(t.Context(), baseDual, bridged(words[0], words[1], words[2:]...)); err != nil {
			t.Errorf("%s: %v", line, err)
		}
		n.Close()
	}
}

// TestNFTablesAtOnce has the first pods of a node come at once: none is lost, and the base stands once.
func TestNFTablesAtOnce(t *testing.T) {
	var processes [][]Attachment
	var all []Attachment
	for i := range 8 {
		var mine []Attachment
		for j := range 5 {
			mine = append(mine, bridged(fmt.Sprintf("c%d-%d@eth0", i, j), fmt.Sprintf("v%d-%d", i, j), fmt.Sprintf("10.1.%d.%d", i, j), fmt.Sprintf("fd00:1::%d:%d", i, j)))
		}
		processes, all = append(processes, mine), append(all, mine...)
	}
	want := standingAfter(t, baseDual, all...)
	n := newNamespace(t)
	n.atOnce(processes...)
	n.wantRuleset("after them all", want)
}
