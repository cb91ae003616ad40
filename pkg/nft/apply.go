package nft

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Apply makes the desired state, and deletes each element of former that is not desired, unless its
// owner has changed. It reads only the elements that desired and former name, by their keys. It
// returns the changes; all of them are one transaction. With dryRun it changes nothing. Where
// nothing differs it sends no transaction.
//
// The error is ErrUnsupported if the kernel lacks something that the ruleset needs, and ErrBusy if
// other processes changed the same objects during each of several attempts. The kernel deletes an
// element by its key, whatever its owner is then: so a caller excludes others who change elements
// with the same keys.
func (c *Conn) Apply(ctx context.Context, desired Ruleset, former []Element, dryRun bool) ([]Change, error) {
	owners := make(map[string]string, len(former)) // by Element.id
	for _, e := range former {
		owners[e.id()] = e.Owner
	}
	return c.apply(ctx, desired, func(s *state) error {
		for _, e := range slices.Concat(desired.Elements, former) {
			if err := c.readElement(s, e); err != nil {
				return err
			}
		}
		return nil
	}, func(e Element) bool { return e.Owner != "" && owners[e.id()] == e.Owner }, dryRun)
}

// ApplyAll is Apply for a caller that owns all elements whose owner isOwned selects, in the tables
// of a name. It reads all elements of these tables.
func (c *Conn) ApplyAll(ctx context.Context, desired Ruleset, table string, isOwned func(owner string) bool, dryRun bool) ([]Change, error) {
	return c.apply(ctx, desired, func(s *state) error {
		return c.readAllElements(ctx, s, table)
	}, func(e Element) bool { return isOwned(e.Owner) }, dryRun)
}

func (c *Conn) apply(ctx context.Context, desired Ruleset, readElements func(*state) error, isOwned func(Element) bool, dryRun bool) ([]Change, error) {
	var changes []Change
	var err error
	for range c.attempts {
		var s *state
		if s, err = c.read(ctx, desired.Tables, readElements); err != nil {
			break
		}
		changes = s.diff(desired, isOwned)
		if dryRun || len(changes) == 0 {
			return changes, nil
		}
		err = c.commit(ctx, changes)
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, ErrBusy) {
			break
		}
	}
	if errors.Is(err, ErrUnsupported) && c.timeout == 0 {
		err = c.addMissingOptions(err, desired.Tables)
	}
	if err != nil {
		return nil, err
	}
	return changes, nil
}

// diff returns the changes that make the kernel's state the desired one: stale elements, then
// chains, then missing elements. A key has one value, so an element with another value or another
// owner is stale and missing.
func (s *state) diff(desired Ruleset, isOwned func(Element) bool) []Change {
	wanted := make(map[string]Element, len(desired.Elements))
	for _, e := range desired.Elements {
		wanted[e.id()] = e
	}
	var stale, chains, missing []Change
	for id, e := range s.elements {
		w, isWanted := wanted[id]
		if isWanted && !e.equal(w) || !isWanted && isOwned(e) {
			stale = append(stale, Change{Kind: Stale, Object: e.String(), element: &e})
		}
	}
	for _, t := range desired.Tables {
		for _, chain := range t.Chains {
			if change, differs := s.diffChain(t, chain); differs {
				chains = append(chains, change)
			}
		}
	}
	for _, e := range desired.Elements {
		if found, exists := s.elements[e.id()]; !exists || !found.equal(e) {
			missing = append(missing, Change{Kind: Missing, Object: e.String(), element: &e})
		}
	}
	slices.SortFunc(stale, func(a, b Change) int { return strings.Compare(a.Object, b.Object) })
	return slices.Concat(stale, chains, missing)
}

func (s *state) diffChain(t Table, desired Chain) (Change, bool) {
	found, exists := s.chains[chainID(desired.Chain)]
	wrongHook := exists && found.hook != hook(desired.Chain)
	var rules []string
	for _, r := range desired.Rules {
		rules = append(rules, r.text(t.Family))
	}
	if exists && !wrongHook && !s.dormant[t.Family] && slices.Equal(found.rules, rules) {
		return Change{}, false
	}
	return Change{
		Kind: Missing, Object: fmt.Sprintf("rules of chain %s of %s", desired.Name, tableName(t.Table)),
		table: &t, chain: &desired, delete: wrongHook,
	}, true
}

// maxElements bounds the elements of one message: the kernel bounds its attributes to 64 KiB.
const maxElements = 100

// commit makes the changes in one transaction.
func (c *Conn) commit(ctx context.Context, changes []Change) error {
	if err := c.setDeadline(ctx); err != nil {
		return err
	}
	for _, change := range changes {
		if change.delete {
			c.conn.FlushChain(change.chain.Chain)
			c.conn.DelChain(change.chain.Chain)
		}
	}
	for _, change := range changes {
		if change.chain == nil {
			continue
		}
		c.conn.AddTable(change.table.Table)
		for _, set := range change.table.Sets {
			if err := c.conn.AddSet(set, nil); err != nil {
				return err
			}
		}
		c.conn.AddChain(change.chain.Chain)
		c.conn.FlushChain(change.chain.Chain)
		for _, r := range change.chain.Rules {
			c.conn.AddRule(&nftables.Rule{
				Table: change.table.Table, Chain: change.chain.Chain, Exprs: r.Exprs,
				UserData: userdata.AppendString(nil, userdata.TypeComment, r.Comment),
			})
		}
	}
	if err := c.commitElements(changes, Stale, c.conn.SetDeleteElements); err != nil {
		return err
	}
	if err := c.commitElements(changes, Missing, c.conn.SetAddElements); err != nil {
		return err
	}
	err := c.conn.Flush()
	if errors.Is(err, unix.ENOENT) && !slices.ContainsFunc(changes, func(change Change) bool { return change.chain != nil }) {
		// The sets exist, so the kernel lacks nothing: another process deleted an element or a table.
		return fmt.Errorf("nftables: %w: %v", ErrBusy, err)
	}
	return WrapError(err)
}

func (c *Conn) commitElements(changes []Change, kind Kind, send func(*nftables.Set, []nftables.SetElement) error) error {
	sets := make(map[string]*nftables.Set)
	elements := make(map[string][]nftables.SetElement)
	for _, change := range changes {
		if e := change.element; e != nil && change.Kind == kind {
			id := setID(e.Set)
			sets[id] = e.Set
			elements[id] = append(elements[id], nftables.SetElement{Key: e.Key, Val: e.Value, Comment: e.Owner})
		}
	}
	for id, all := range elements {
		for some := range slices.Chunk(all, maxElements) {
			if err := send(sets[id], some); err != nil {
				return err
			}
		}
	}
	return nil
}
