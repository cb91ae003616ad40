package redirect

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// call is what a process does with an attachment: it adds or removes it.
type call struct {
	remove bool
	Attachment
}

func adds(attachments ...Attachment) (calls []call) {
	for _, a := range attachments {
		calls = append(calls, call{false, a})
	}
	return calls
}

// atOnce has processes of their own make calls in this namespace, each its own and one after the other, under the lock that
// the plugin's have.
func (n *namespace) atOnce(processes ...[]call) {
	n.Helper()
	lock := filepath.Join(n.TempDir(), "lock")
	var started []*exec.Cmd
	for _, calls := range processes {
		var lines []string
		for _, c := range calls {
			line := []string{fmt.Sprint(c.remove), c.ID, c.HostLink}
			for _, r := range c.Redirections {
				line = append(line, r.Source.String())
			}
			lines = append(lines, strings.Join(line, " "))
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestCallsOfOneProcess$")
		// The race detector holds a process for a second at its end unless told not to.
		cmd.Env = append(os.Environ(), "CALLS="+strings.Join(lines, "\n"), "LOCK="+lock, "GORACE=atexit_sleep_ms=0")
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

// TestCallsOfOneProcess is not a test of this process.
func TestCallsOfOneProcess(t *testing.T) {
	lines := os.Getenv("CALLS")
	if lines == "" {
		t.Skip("it is one of those that TestNFTablesAtOnce starts")
	}
	for line := range strings.SplitSeq(lines, "\n") {
		words := strings.Fields(line)
		n := &Node{Lock: func(context.Context) (func(), error) {
			f, err := os.OpenFile(os.Getenv("LOCK"), os.O_CREATE|os.O_RDWR, 0o600)
			if err == nil {
				err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
			}
			return func() { f.Close() }, err
		}}
		b, err := n.Backend(NFTables)
		if err != nil {
			t.Fatal(err)
		}
		a := bridged(words[1], words[2], words[3:]...)
		if words[0] == "true" {
			err = n.Remove(NFTables, a)
		} else {
			err = b.Add(t.Context(), baseDual, a)
		}
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
		n.Close()
	}
}

// TestNFTablesAtOnce has the first pods of a node come at once: none is lost, and the base stands once.
func TestNFTablesAtOnce(t *testing.T) {
	var processes [][]call
	var all []Attachment
	for i := range 8 {
		var mine []Attachment
		for j := range 5 {
			mine = append(mine, bridged(fmt.Sprintf("c%d-%d@eth0", i, j), fmt.Sprintf("v%d-%d", i, j), fmt.Sprintf("10.1.%d.%d", i, j), fmt.Sprintf("fd00:1::%d:%d", i, j)))
		}
		processes, all = append(processes, adds(mine...)), append(all, mine...)
	}
	want := standingAfter(t, baseDual, all...)
	n := newNamespace(t)
	n.atOnce(processes...)
	n.wantRuleset("after them all", want)
}

// TestNFTablesContest has two attachments claim one address at once: one has it, and it has all of it.
func TestNFTablesContest(t *testing.T) {
	first, second := bridged("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"), bridged("c2@eth0", "veth0", "10.1.0.5", "fd00:1::5")
	wants := []string{standingAfter(t, baseDual, first), standingAfter(t, baseDual, second)}
	n := newNamespace(t)
	for range 10 {
		n.atOnce(adds(first), adds(second))
		if got := n.ruleset(); got != wants[0] && got != wants[1] {
			t.Errorf("neither has it:\n%s", diff(wants[0], got))
		}
	}
}

// TestNFTablesLateRemove has the DEL of an address's former holder come at once with its heir's ADD: the heir has it.
func TestNFTablesLateRemove(t *testing.T) {
	former, heir := bridged("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"), bridged("c2@eth0", "veth0", "10.1.0.5", "fd00:1::5")
	want := standingAfter(t, baseDual, heir)
	n := newNamespace(t)
	for range 10 {
		n.atOnce(adds(former))
		n.atOnce([]call{{true, former}}, adds(heir))
		n.wantRuleset("after both", want)
	}
}

// TestAnotherBody has rules that carry the comments of ours and do something else, and a chain that is hooked in nowhere: as
// another version of the plugin leaves them, or somebody's hand.
func TestAnotherBody(t *testing.T) {
	for name, damage := range map[string]string{
		"guard": "flush chain ip kube2iam-cni guard\nadd rule ip kube2iam-cni guard accept comment \"guard\"",
		"hook":  "delete chain ip kube2iam-cni guard\nadd chain ip kube2iam-cni guard\nadd rule ip kube2iam-cni guard ip daddr . tcp dport @metadata reject with tcp reset comment \"guard\"",
	} {
		for _, by := range []string{"ADD", "Repair"} {
			t.Run(name+" "+by, func(t *testing.T) {
				n := newRepairNode(t, NFTables)
				n.nft(damage)
				if by == "ADD" {
					n.add(NFTables, bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6"))
				} else {
					_, err := n.Repair(t.Context(), n.wanted, false)
					n.must(err)
				}
				if after := n.all(); after != n.whole {
					t.Error(diff(n.whole, after))
				}
			})
		}
	}
}
