package redirect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Table is the name of our tables, one in each family.
const Table = "kube2iam-cni"

// nft is the kernel's nftables by netlink, in one network namespace: that of the thread that first uses it, or that of a
// path. A change is one transaction, which happens as a whole or not at all. It is not for concurrent use.
type nft struct {
	netns string
	// lock is held from the look at what stands to its change: the kernel deletes an element by its key, whoever's it is by
	// then. Nil is for a namespace in which nobody else changes our tables.
	lock func(context.Context) (unlock func(), err error)
	// options are for tests.
	options []nftables.ConnOption
	conn    *nftables.Conn
	socket  *netlink.Conn // conn's own, in a pod's namespace
}

// podPatience bounds each reading and each change of a pod's namespace: a pod with NET_ADMIN can fill its tables with
// whatever it likes.
const podPatience = 500 * time.Millisecond

// startStep gives the next reading or change in a pod's namespace its time.
func (k *nft) startStep() error {
	if k.socket == nil {
		return nil
	}
	return k.socket.SetReadDeadline(time.Now().Add(podPatience))
}

func (k *nft) open() (*nftables.Conn, error) {
	if k.conn != nil {
		return k.conn, nil
	}
	options := append([]nftables.ConnOption{nftables.AsLasting()}, k.options...)
	if k.netns != "" {
		pod, err := openPod(k.netns)
		if err != nil {
			return nil, err
		}
		defer pod.Close()
		options = append(options, nftables.WithNetNSFd(int(pod)), nftables.WithSockOptions(func(c *netlink.Conn) error {
			k.socket = c
			return nil
		}))
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
		k.conn, k.socket = nil, nil
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

// nftRule carries its meaning as comment, for people.
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

// maxElements is how many elements go into one message, whose attributes the kernel bounds to 64 KiB.
const maxElements = 100

// apply makes each table's chains hold just its rules, removes gone and adds come, all in one transaction. Sets of the
// tables are made where they are missing, and keep what they hold. Chains that are misplaced are made anew.
func (k *nft) apply(tables []table, misplaced []*nftables.Chain, gone, come []element) error {
	conn, err := k.open()
	if err != nil {
		return err
	}
	if err := k.startStep(); err != nil {
		return err
	}
	for _, c := range misplaced {
		conn.FlushChain(c)
		conn.DelChain(c)
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

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyBridge:
		return "bridge"
	case nftables.TableFamilyINet:
		return "inet"
	}
	return fmt.Sprint(f)
}

// supported makes the errors of a kernel that lacks a part of nftables, and of one that is busy, what callers ask for. A
// kernel that lacks the module behind an expression or a family says that there is no such thing.
func supported(err error) error {
	_, ofFile := errors.AsType[*fs.PathError](err)
	switch {
	case err == nil:
		return nil
	case ofFile, errors.Is(err, ErrUnsupported):
		return err
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("nftables: %w: %w", ErrUnsupported, err)
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR):
		return fmt.Errorf("nftables: %w: %w", ErrBusy, err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("nftables: %w: %w", ErrUnsupported, err)
	}
	return fmt.Errorf("nftables: %w", err)
}

// listTables returns the namespace's tables. The error is ErrUnsupported where the kernel has no nf_tables: it answers a read
// with EINVAL then, and only a batch with EOPNOTSUPP (net/netfilter/nfnetlink.c, nfnetlink_rcv_msg and nfnetlink_rcv_batch).
func listTables(conn *nftables.Conn) ([]*nftables.Table, error) {
	tables, err := conn.ListTables()
	if errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("nftables: %w: %w", ErrUnsupported, err)
	}
	return tables, supported(err)
}

// inKernel returns an error that is ErrUnsupported where the kernel has no nf_tables, and else none.
func (k *nft) inKernel() error {
	conn, err := k.open()
	if err == nil {
		_, err = listTables(conn)
	}
	if errors.Is(err, ErrUnsupported) {
		return err
	}
	return nil
}

// replace makes tables and wanted elements stand, and no others that carry the identity. Tables that stand as they should are
// left alone: a transaction that takes nothing away is over at once, and one that does keeps its process waiting at its end
// until no packet is on its way through what went (an RCU grace period, at the socket's close).
func (k *nft) replace(tables []table, wanted []element, id string) error {
	return k.transact(tables, func(s *standing) error {
		gone, come := s.change(wanted, func(comment string) bool { return comment == id && id != "" })
		lacking := slices.DeleteFunc(slices.Clone(tables), func(t table) bool { return len(s.lacks([]table{t})) == 0 })
		if len(lacking)+len(gone)+len(come) == 0 {
			return nil
		}
		return k.apply(lacking, s.misplaced(lacking), gone, come)
	})
}

// missing names what is wanted and does not stand.
func (k *nft) missing(tables []table, wanted []element) ([]string, error) {
	if len(tables) == 0 {
		return nil, nil
	}
	s, err := k.read(tables)
	if err != nil {
		return nil, err
	}
	return s.missing(tables, wanted), nil
}

// removeAll deletes the elements that carry an identity, and returns them.
func (k *nft) removeAll(id string) (gone []element, err error) {
	err = k.transact(nil, func(s *standing) error {
		if gone = s.of(id); len(gone) == 0 {
			return nil
		}
		return k.apply(nil, nil, gone, nil)
	})
	if errors.Is(err, ErrUnsupported) {
		return nil, nil // a kernel without nftables holds no element
	}
	return gone, err
}

// removing begins to delete the elements that carry an identity, and returns what waits for its end. Meanwhile nothing else
// may be done with k. The kernel keeps who took something away waiting for the packets on their way through it, at the
// socket's close: which is long enough to do something else.
func (k *nft) removing(id string) (ended func() error, err error) {
	if _, err := k.open(); err != nil { // here, in the thread's own network namespace
		if errors.Is(err, ErrUnsupported) {
			return func() error { return nil }, nil
		}
		return nil, err
	}
	done := make(chan error, 1)
	go func() {
		err := k.removeLeftovers(id)
		k.close()
		done <- err
	}()
	return func() error { return <-done }, nil
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
	return did, k.transact(tables, func(s *standing) error {
		gone, come := s.change(wanted, attachments)
		return k.apply(tables, s.misplaced(tables), gone, come)
	})
}
