package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Table is the name of our tables, one in each family.
const Table = "kube2iam-cni"

// nft is the kernel's nftables by netlink, in one network namespace: that of the thread that first uses it, or that of a
// path. A change is one transaction, which happens as a whole or not at all. It is not for concurrent use.
type nft struct {
	netns string
	conn  *nftables.Conn
}

func (k *nft) open() (*nftables.Conn, error) {
	if k.conn != nil {
		return k.conn, nil
	}
	options := []nftables.ConnOption{nftables.AsLasting()}
	if k.netns != "" {
		pod, err := netns.GetFromPath(k.netns)
		if err != nil {
			return nil, err
		}
		defer pod.Close()
		options = append(options, nftables.WithNetNSFd(int(pod)))
	}
	conn, err := nftables.New(options...)
	if err != nil {
		return nil, supported(err)
	}
	k.conn = conn
	return conn, nil
}

func (k *nft) close() {
	if k.conn != nil {
		k.conn.CloseLasting()
		k.conn = nil
	}
}

// table is one table as it is wanted: its sets, and its chains with all their rules.
type table struct {
	*nftables.Table
	sets   []*nftables.Set
	chains []chain
}

type chain struct {
	*nftables.Chain
	rules []nftRule
}

// nftRule carries its meaning as comment, by which a standing one is known again.
type nftRule struct {
	comment string
	exprs   []expr.Any
}

// element is one entry of a set or a map. Its comment is the identity of the attachment that it is for, or Comment where it
// is the node's.
type element struct {
	set *nftables.Set
	nftables.SetElement
}

// place is a set's name in all of nftables.
type place struct {
	family nftables.TableFamily
	set    string
}

func placeOf(s *nftables.Set) place { return place{s.Table.Family, s.Name} }

// standing is what stands in the kernel of our tables.
type standing struct {
	rules    map[nftables.TableFamily]map[string][]string // comments, by chain
	elements map[place]map[string]element                 // by key
}

// maxElements is how many elements go into one message, whose attributes the kernel bounds to 64 KiB.
const maxElements = 100

// apply makes each table's chains hold just its rules, removes gone and adds come, all in one transaction. Sets of the
// tables are made where they are missing, and keep what they hold.
func (k *nft) apply(tables []table, gone, come []element) error {
	conn, err := k.open()
	if err != nil {
		return err
	}
	for _, t := range tables {
		conn.AddTable(t.Table)
		for _, s := range t.sets {
			if err := conn.AddSet(s, nil); err != nil {
				return err
			}
		}
		for _, c := range t.chains {
			conn.AddChain(c.Chain)
			conn.FlushChain(c.Chain)
			for _, r := range c.rules {
				conn.AddRule(&nftables.Rule{
					Table: t.Table, Chain: c.Chain, Exprs: r.exprs,
					UserData: userdata.AppendString(nil, userdata.TypeComment, r.comment),
				})
			}
		}
	}
	if err := inMessages(gone, conn.SetDeleteElements); err != nil {
		return err
	}
	if err := inMessages(come, conn.SetAddElements); err != nil {
		return err
	}
	return supported(conn.Flush())
}

func inMessages(elements []element, send func(*nftables.Set, []nftables.SetElement) error) error {
	bySet := make(map[place][]nftables.SetElement)
	sets := make(map[place]*nftables.Set)
	for _, e := range elements {
		at := placeOf(e.set)
		sets[at] = e.set
		bySet[at] = append(bySet[at], e.SetElement)
	}
	for at, all := range bySet {
		for some := range slices.Chunk(all, maxElements) {
			if err := send(sets[at], some); err != nil {
				return err
			}
		}
	}
	return nil
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
	}
	return nil, supported(err)
}

func (k *nft) readOnce(wanted []table) (*standing, error) {
	conn, err := k.open()
	if err != nil {
		return nil, err
	}
	tables, err := conn.ListTables()
	if err != nil {
		return nil, err
	}
	s := &standing{rules: make(map[nftables.TableFamily]map[string][]string), elements: make(map[place]map[string]element)}
	for _, t := range tables {
		if t.Name != Table {
			continue
		}
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
	if s.rules[wanted.Family] == nil {
		s.rules[wanted.Family] = make(map[string][]string)
	}
	for _, c := range wanted.chains {
		rules, err := conn.GetRules(wanted.Table, c.Chain)
		if err != nil {
			return err
		}
		comments := []string{}
		for _, r := range rules {
			comment, _ := userdata.GetString(r.UserData, userdata.TypeComment)
			comments = append(comments, comment)
		}
		s.rules[wanted.Family][c.Name] = comments
	}
	return nil
}

// lacks names the chains of the tables that are missing or do not hold just the rules that are wanted.
func (s *standing) lacks(tables []table) []string {
	var missing []string
	for _, t := range tables {
		for _, c := range t.chains {
			wanted := []string{}
			for _, r := range c.rules {
				wanted = append(wanted, r.comment)
			}
			if there, ok := s.rules[t.Family][c.Name]; !ok || !slices.Equal(there, wanted) {
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
		for _, e := range slices.Collect(maps.Values(keys)) {
			if !s.holds(e) {
				come = append(come, e)
			}
		}
	}
	return gone, come
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyBridge:
		return "bridge"
	}
	return fmt.Sprint(f)
}

// supported makes the errors of a kernel that lacks a part of nftables, and of one that is busy, what callers ask for. A
// kernel that lacks the module behind an expression or a family says that there is no such thing.
func supported(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("nftables: %w: %w", ErrUnsupported, err)
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR):
		return fmt.Errorf("nftables: %w: %w", ErrBusy, err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("nftables: %w: %w", ErrUnsupported, err)
	}
	return fmt.Errorf("nftables: %w", err)
}

// replace makes tables and wanted elements stand, and no others that carry the identity. Tables that stand as they should are
// left alone: a transaction that takes nothing away is over at once, and one that does keeps its process waiting at its end
// until no packet is on its way through what went (an RCU grace period, at the socket's close).
func (k *nft) replace(tables []table, wanted []element, id string) error {
	return k.transact(tables, func(s *standing) error {
		gone, come := s.change(wanted, func(comment string) bool { return comment == id })
		lacking := slices.DeleteFunc(slices.Clone(tables), func(t table) bool { return len(s.lacks([]table{t})) == 0 })
		if len(lacking)+len(gone)+len(come) == 0 {
			return nil
		}
		return k.apply(lacking, gone, come)
	})
}

// transact reads what stands and changes it, again where somebody else's change came in between.
func (k *nft) transact(wanted []table, change func(*standing) error) (err error) {
	for range 5 {
		var s *standing
		if s, err = k.read(wanted); err != nil {
			return err
		}
		if err = change(s); err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, ErrBusy) {
			return err
		}
	}
	return err
}

// removeAll deletes the elements that carry an identity, and returns them.
func (k *nft) removeAll(id string) (gone []element, err error) {
	err = k.transact(nil, func(s *standing) error {
		if gone = s.of(id); len(gone) == 0 {
			return nil
		}
		return k.apply(nil, gone, nil)
	})
	if errors.Is(err, ErrUnsupported) {
		return nil, nil // a kernel without nftables holds no element
	}
	return gone, err
}

func (k *nft) removeLeftovers(id string) error {
	_, err := k.removeAll(id)
	return err
}

// repair makes tables and wanted elements stand, and removes the elements of attachments that are none of those wanted. What
// it did is in the list; it looks only, where dry is true.
func (k *nft) repair(tables []table, wanted []element, dry bool) ([]string, error) {
	s, err := k.read(tables)
	if errors.Is(err, ErrUnsupported) && len(tables) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	attachments := func(comment string) bool { return strings.Contains(comment, "@") } // one without an identity is not ours to judge
	var did []string
	for _, what := range s.missing(tables, wanted) {
		did = append(did, "missing: "+what)
	}
	gone, _ := s.change(wanted, attachments)
	for _, e := range gone {
		did = append(did, "stale: "+e.String())
	}
	if dry || len(did) == 0 {
		return did, nil
	}
	return did, k.transact(nil, func(s *standing) error {
		gone, come := s.change(wanted, attachments)
		return k.apply(tables, gone, come)
	})
}
