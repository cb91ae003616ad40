package nft

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

var (
	table   = &nftables.Table{Name: "test", Family: nftables.TableFamilyIPv4}
	numbers = &nftables.Set{Table: table, Name: "numbers", KeyType: nftables.TypeInteger}
)

// ruleset has a chain, and a set with the given elements.
func ruleset(elements ...Element) Ruleset {
	accept := nftables.ChainPolicyAccept
	chain := Chain{Chain: &nftables.Chain{
		Name: "in", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput,
		Priority: nftables.ChainPriorityFilter, Policy: &accept,
	}}
	return Ruleset{Tables: []Table{{Table: table, Sets: []*nftables.Set{numbers}, Chains: []Chain{chain}}}, Elements: elements}
}

func number(n byte, owner string) Element {
	return Element{Set: numbers, Key: []byte{0, 0, 0, n}, Owner: owner}
}

func objects(changes []Change) []string {
	var objects []string
	for _, c := range changes {
		objects = append(objects, c.String())
	}
	return objects
}

func open(t *testing.T, netns *netnstest.Netns, timeout time.Duration) *Conn {
	t.Helper()
	conn, err := Open(InNetns(netns.NsHandle, timeout))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestApplyRemovesFormerElementsOfTheirOwnerOnly(t *testing.T) {
	conn := open(t, netnstest.New(t), 0)
	if _, err := conn.Apply(t.Context(), ruleset(number(1, "a"), number(2, "b"), number(3, "a")), nil, false); err != nil {
		t.Fatal(err)
	}
	former := []Element{number(1, "a"), number(2, "a"), number(4, "a")}
	want := []string{"stale: entry of a in set numbers of table ip test"}
	for _, dryRun := range []bool{true, false} {
		changes, err := conn.Apply(t.Context(), ruleset(), former, dryRun)
		if err != nil || !slices.Equal(objects(changes), want) {
			t.Errorf("dry run %v: %q, %v, want %q", dryRun, changes, err, want)
		}
	}
	changes, err := conn.ApplyAll(t.Context(), ruleset(number(2, "b"), number(3, "a")), table.Name, func(string) bool { return true }, true)
	if err != nil || len(changes) > 0 {
		t.Errorf("after Apply: %q, %v", changes, err)
	}
}

func TestApplyAllRemovesAllOwnedElements(t *testing.T) {
	conn := open(t, netnstest.New(t), 0)
	if _, err := conn.Apply(t.Context(), ruleset(number(1, "a"), number(2, "b"), number(3, "a")), nil, false); err != nil {
		t.Fatal(err)
	}
	changes, err := conn.ApplyAll(t.Context(), ruleset(number(3, "a")), table.Name, func(owner string) bool { return owner == "a" }, false)
	if want := []string{"stale: entry of a in set numbers of table ip test"}; err != nil || !slices.Equal(objects(changes), want) {
		t.Errorf("%q, %v, want %q", changes, err, want)
	}
}

// TestLostRaceIsNoLackOfTheKernel has an element of a set that does not exist. The kernel answers
// ENOENT, as for a module that it lacks. The chain exists, so the kernel has what is needed.
func TestLostRaceIsNoLackOfTheKernel(t *testing.T) {
	conn := open(t, netnstest.New(t), 0)
	if _, err := conn.Apply(t.Context(), ruleset(), nil, false); err != nil {
		t.Fatal(err)
	}
	e := number(1, "a")
	e.Set = &nftables.Set{Table: table, Name: "deleted", KeyType: nftables.TypeInteger}
	if _, err := conn.Apply(t.Context(), ruleset(e), nil, false); !errors.Is(err, ErrBusy) || errors.Is(err, ErrUnsupported) {
		t.Errorf("got %v, want %v", err, ErrBusy)
	}
}

// TestLongChainInAPod has a chain that cannot be read in time, as a pod with NET_ADMIN can make it.
func TestLongChainInAPod(t *testing.T) {
	netns := netnstest.New(t)
	netns.NFT("table ip test { chain in { type filter hook input priority 0; }; }")
	for range 30 { // root of a user namespace cannot send more in one transaction
		netns.NFT(strings.Repeat("add rule ip test in counter\n", 1000))
	}
	conn := open(t, netns, 2*time.Millisecond)
	if _, err := conn.Apply(t.Context(), ruleset(), nil, true); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want %v", err, os.ErrDeadlineExceeded)
	}
	if !conn.IsExpired() {
		t.Error("the connection is not expired: the next read would get the rest of the answer")
	}
}
