package redirect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// standing is what stands in the kernel of our tables.
type standing struct {
	dormant  map[nftables.TableFamily]bool // tables whose chains see no packet; one that is made again wakes
	chains   map[nftables.TableFamily]map[string]standingChain
	elements map[place]map[string]element // by key
}

type standingChain struct {
	hook  string
	rules []string
}

// text is a rule as it can be compared: what it does, byte for byte, and its comment.
func (r nftRule) text(f nftables.TableFamily) string {
	var b strings.Builder
	for _, e := range r.exprs {
		bytes, err := expr.Marshal(byte(f), e)
		fmt.Fprintf(&b, "%x %v\n", bytes, err)
	}
	return b.String() + r.comment
}

// hookOf is where a chain is hooked in, with which priority.
func hookOf(c *nftables.Chain) string {
	if c.Hooknum == nil || c.Priority == nil {
		return "nowhere"
	}
	return fmt.Sprint(c.Type, " ", *c.Hooknum, " ", *c.Priority)
}

// read is what stands in our tables: all elements, and the rules of the wanted tables' chains. Tables that are not there hold
// nothing. A dump that a change of somebody else's comes into is begun again.
func (k *nft) read(wanted []table) (*standing, error) {
	var s *standing
	var err error
	for range 5 {
		if s, err = k.readOnce(wanted); err == nil {
			return s, nil
		}
		if errors.Is(err, os.ErrDeadlineExceeded) || k.netns != "" {
			break
		}
	}
	return nil, supported(err)
}

func (k *nft) readOnce(wanted []table) (*standing, error) {
	conn, err := k.open()
	if err != nil {
		return nil, err
	}
	if err := k.startStep(); err != nil {
		return nil, err
	}
	tables, err := listTables(conn)
	if err != nil {
		return nil, err
	}
	s := &standing{dormant: make(map[nftables.TableFamily]bool), chains: make(map[nftables.TableFamily]map[string]standingChain), elements: make(map[place]map[string]element)}
	for _, t := range tables {
		if t.Name != Table {
			continue
		}
		s.dormant[t.Family] = t.Flags != 0 // no other flag can come to a table that was made without one
		if err := s.readElements(conn, t); err != nil {
			return nil, err
		}
		for _, w := range wanted {
			if w.Family != t.Family {
				continue
			}
			if err := s.readRules(conn, w); err != nil {
				return nil, err
			}
		}
	}
	return s, nil
}

func (s *standing) readElements(conn *nftables.Conn, t *nftables.Table) error {
	sets, err := conn.GetSets(t)
	if err != nil {
		return err
	}
	for _, set := range sets {
		entries, err := conn.GetSetElements(set)
		if err != nil {
			return err
		}
		held := make(map[string]element, len(entries))
		for _, e := range entries {
			held[string(e.Key)] = element{set, e}
		}
		s.elements[placeOf(set)] = held
	}
	return nil
}

// readRules asks for the chains by name: other programs may have thousands.
func (s *standing) readRules(conn *nftables.Conn, wanted table) error {
	if s.chains[wanted.Family] == nil {
		s.chains[wanted.Family] = make(map[string]standingChain)
	}
	for _, c := range wanted.chains {
		rules, err := conn.GetRules(wanted.Table, c.Chain)
		if err != nil {
			return err
		}
		there, err := conn.ListChain(wanted.Table, c.Name)
		if err != nil && len(rules) == 0 {
			continue // there is none: the library hides the error's kind
		}
		if err != nil {
			return err
		}
		found := standingChain{hook: hookOf(there)}
		for _, r := range rules {
			comment, _ := userdata.GetString(r.UserData, userdata.TypeComment)
			found.rules = append(found.rules, nftRule{comment, r.Exprs}.text(wanted.Family))
		}
		s.chains[wanted.Family][c.Name] = found
	}
	return nil
}

// misplaced are the wanted chains that stand without their hook: such a one cannot be given it.
func (s *standing) misplaced(tables []table) []*nftables.Chain {
	var all []*nftables.Chain
	for _, t := range tables {
		for _, c := range t.chains {
			if there, ok := s.chains[t.Family][c.Name]; ok && there.hook != hookOf(c.Chain) {
				all = append(all, c.Chain)
			}
		}
	}
	return all
}

// lacks names the chains of the tables that are missing or misplaced, or do not hold just the rules that are wanted.
func (s *standing) lacks(tables []table) []string {
	var missing []string
	for _, t := range tables {
		for _, c := range t.chains {
			var wanted []string
			for _, r := range c.rules {
				wanted = append(wanted, r.text(t.Family))
			}
			if there, ok := s.chains[t.Family][c.Name]; !ok || s.dormant[t.Family] || there.hook != hookOf(c.Chain) || !slices.Equal(there.rules, wanted) {
				missing = append(missing, fmt.Sprintf("%s in table %s %s", c.Name, familyName(t.Family), Table))
			}
		}
	}
	return missing
}

// holds tells whether an element stands with its value and its comment.
func (s *standing) holds(e element) bool {
	there, ok := s.elements[placeOf(e.set)][string(e.Key)]
	return ok && same(there, e)
}

func same(a, b element) bool {
	return string(a.Val) == string(b.Val) && a.Comment == b.Comment
}

// of are the elements that carry an identity.
func (s *standing) of(id string) []element {
	var found []element
	for _, held := range s.elements {
		for _, e := range held {
			if e.Comment == id {
				found = append(found, e)
			}
		}
	}
	return found
}

// change is what has to go and to come for the wanted elements to stand and, of those identities that are replaced, no
// others. A key has one value: whoever holds a wanted one gives it up.
func (s *standing) change(wanted []element, replaced func(id string) bool) (gone, come []element) {
	want := make(map[place]map[string]element)
	for _, e := range wanted {
		at := placeOf(e.set)
		if want[at] == nil {
			want[at] = make(map[string]element)
		}
		want[at][string(e.Key)] = e
	}
	for at, held := range s.elements {
		for key, e := range held {
			w, wanted := want[at][key]
			if wanted && !same(w, e) || !wanted && replaced(e.Comment) {
				gone = append(gone, e)
			}
		}
	}
	for _, keys := range want {
		for _, e := range keys {
			if !s.holds(e) {
				come = append(come, e)
			}
		}
	}
	return gone, come
}

// transact reads what stands and changes it, again where the change of somebody who takes no lock came in between.
func (k *nft) transact(wanted []table, change func(*standing) error) (err error) {
	unlock, err := k.alone()
	if err != nil {
		return err
	}
	defer unlock()
	attempts := 5
	if k.netns != "" {
		attempts = 2 // a pod can change its tables at any moment
	}
	for range attempts {
		var s *standing
		if s, err = k.read(wanted); err != nil {
			return err
		}
		if err = change(s); err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, ErrBusy) {
			break
		}
	}
	if errors.Is(err, ErrUnsupported) && k.netns == "" {
		return k.explain(wanted, err)
	}
	return err
}

// alone keeps others who take the node's lock from changing anything until unlock is called.
func (k *nft) alone() (unlock func(), err error) {
	if k.lock == nil {
		return func() {}, nil
	}
	return k.lock(context.Background())
}
