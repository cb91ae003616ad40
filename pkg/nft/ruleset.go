package nft

import (
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Ruleset is a desired state. Chains hold exactly the rules given. Chains and elements that it does
// not name stay as they are, except for the caller's own elements.
type Ruleset struct {
	// Tables can contain several entries of one table. They are made together.
	Tables   []Table
	Elements []Element
}

// Append adds another desired state.
func (r *Ruleset) Append(other Ruleset) {
	r.Tables = append(r.Tables, other.Tables...)
	r.Elements = append(r.Elements, other.Elements...)
}

// Table is a table with the sets and chains that are desired in it. Sets that are missing are made;
// existing ones keep their elements.
type Table struct {
	*nftables.Table
	Sets   []*nftables.Set
	Chains []Chain
}

// Chain is a base chain with all of its rules.
type Chain struct {
	*nftables.Chain
	Rules []Rule
}

// Rule is a rule. Its comment explains it to people.
type Rule struct {
	Comment string
	Exprs   []expr.Any
}

// Element is an element of a set or a map.
type Element struct {
	Set   *nftables.Set
	Key   []byte
	Value []byte // of a map's element, else nil
	// Owner is the element's comment.
	Owner string
	// Object names the element for people. It is optional and not compared.
	Object string
}

// Kind says how the kernel's state differs from the desired one.
type Kind string

const (
	// Missing is an object that is desired and that the kernel lacks, or has with another content.
	Missing Kind = "missing"
	// Stale is an object that the kernel has and that is not desired.
	Stale Kind = "stale"
)

// Change is one difference between the kernel's state and the desired one.
type Change struct {
	Kind Kind
	// Object names the object for people.
	Object string

	table   *Table   // of chain
	chain   *Chain   // missing or different
	delete  bool     // the chain's hook is wrong, so it is deleted first
	element *Element // missing or stale
}

func (c Change) String() string { return string(c.Kind) + ": " + c.Object }

func (e Element) String() string {
	object := e.Object
	if object == "" {
		object = "entry"
	}
	return fmt.Sprintf("%s of %s in set %s of %s", object, e.Owner, e.Set.Name, tableName(e.Set.Table))
}

// id identifies an element in all of nftables.
func (e Element) id() string { return setID(e.Set) + string(e.Key) }

func setID(s *nftables.Set) string {
	return fmt.Sprintf("%d %s %s ", s.Table.Family, s.Table.Name, s.Name)
}

func (e Element) equal(other Element) bool {
	return string(e.Value) == string(other.Value) && e.Owner == other.Owner
}

// text renders a rule so that two rules with equal text do the same: its expressions as the kernel
// encodes them, and its comment.
func (r Rule) text(f nftables.TableFamily) string {
	var b strings.Builder
	for _, e := range r.Exprs {
		bytes, err := expr.Marshal(byte(f), e)
		fmt.Fprintf(&b, "%x %v\n", bytes, err)
	}
	return b.String() + r.Comment
}

func tableName(t *nftables.Table) string { return "table " + familyName(t.Family) + " " + t.Name }

func familyName(f nftables.TableFamily) string {
	switch f {
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_BRIDGE:
		return "bridge"
	case unix.NFPROTO_INET:
		return "inet"
	}
	return fmt.Sprint(byte(f))
}
