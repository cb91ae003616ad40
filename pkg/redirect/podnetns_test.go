package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHostNetnsIsNoPods has the path of an attachment lead to the host's own namespace, as one by a PID does that a process of the
// host got after the pod's: nothing is made, sent or removed there.
func TestHostNetnsIsNoPods(t *testing.T) {
	n := newNamespace(t)
	a := routed("c1@eth0", "veth0", "10.1.0.5")
	b, err := n.Backend(NFTables)
	n.must(err)
	n.must(b.Add(t.Context(), base4, a))
	before := n.run("nft list ruleset")
	file, err := os.Open("/proc/thread-self/ns/net")
	n.must(err)
	defer file.Close()
	for _, path := range []string{
		"/proc/thread-self/ns/net",
		fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid()),
		fmt.Sprintf("/proc/self/fd/%d", file.Fd()),
	} {
		a.Netns = path
		if err := n.AddInPod(a); !errors.Is(err, ErrHostNetns) {
			t.Errorf("%s: ADD: %v", path, err)
		}
		if missing, err := n.MissingInPod(a); !errors.Is(err, ErrHostNetns) {
			t.Errorf("%s: CHECK: %v, %v", path, missing, err)
		}
		if err := n.Remove(NFTables, a); err != nil {
			t.Errorf("%s: DEL: %v", path, err)
		}
		if seen, err := n.Seen(path, netip.MustParseAddr("127.0.0.1"), base4.Metadata[0]); !errors.Is(err, ErrHostNetns) {
			t.Errorf("%s: a probe: %v, %v", path, seen, err)
		}
		if after := n.run("nft list ruleset"); after != before {
			t.Errorf("%s: the host's rules:\n%s", path, diff(before, after))
		}
	}
}
