package redirect

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// NFTablesBackend programs rules by netlink: tables of its own, one transaction for an ADD and one for a DEL, no process
// run and no command on the node. The rules never change: pods are elements of the sets and maps that the rules look into,
// so a packet's way is as long with one pod as with a thousand. It is not for concurrent use.
type NFTablesBackend struct {
	ports *ports
	// unguarded is Node.unguarded.
	unguarded func([]netip.AddrPort, error) error
}

// redirectPriority puts the chain before those of other programs in destination NAT (-100), where the first to translate a
// connection has it.
const redirectPriority = -110

// guardPriority is that of mangle. What comes later cannot take the guard's verdict back: a drop is final in whichever
// chain, an accept only in its own.
const guardPriority = -150

// Form implements Backend.
func (t *NFTablesBackend) Form() Form { return NFTables }

// Open implements Backend.
func (t *NFTablesBackend) Open(_ Base, a Attachment) error { return a.validate() }

// The sets of the families' tables.
func (f *family) ipServices() *nftables.Set { return set(f.ipTable(), "metadata", f.socket(), true) }
func (f *family) ipAddresses() *nftables.Set {
	return set(f.ipTable(), "addresses", f.addr, false)
}
func (f *family) routed() *nftables.Set {
	return mapping(f.ipTable(), "routed", f.holder(), f.socket(), true)
}
func (f *family) bridged() *nftables.Set {
	return mapping(f.ipTable(), "bridged", f.addr, f.socket(), false)
}

// tables are those of the base, and of the bridge where there is one. With the guard, a family is guarded that nothing is
// redirected in.
func (t *NFTablesBackend) tables(base Base, bridged bool) []table {
	var tables []table
	if bridged {
		tables = t.ports.tables(base)[:1]
	}
	for _, f := range base.families() {
		own := f.ipTable()
		services := f.ipServices()
		to := f.toService(services)
		key := []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg0}, f.load(f.saddr, reg(nameRegs))}
		chains := []chain{
			hooked(own, "redirections", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, redirectPriority,
				nftRule{"by the veth", slices.Concat(to, f.dnat(f.routed(), key...))},
				nftRule{fmt.Sprintf("by the port, mark %#x", base.mark()), slices.Concat(to, marked(base.mark()), f.dnat(f.bridged(), f.load(f.saddr, reg0)))}),
			f.unmark(own, base),
		}
		sets := []*nftables.Set{services, f.routed(), f.bridged()}
		if base.Guard {
			chains = append(chains, f.backstop(), f.guard())
			sets = append(sets, f.ipAddresses())
		}
		tables = append(tables, table{Table: own, sets: sets, chains: chains})
	}
	return append(tables, guards(base.besides())...)
}

// guard refuses what is forwarded to a service's address, TCP with a reset.
func (f *family) guard() chain {
	reset := slices.Concat(isTCP(), f.toAddress(f.ipAddresses()), []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	return hooked(f.ipTable(), "guard", nftables.ChainTypeFilter, nftables.ChainHookForward, guardPriority,
		append([]nftRule{{"guard of TCP", reset}}, f.refuse(f.ipAddresses())...)...)
}

// backstop drops packets to a service's address that the host did not send itself and that pass no guard in forward: IPVS
// sends them from input to output, and a source route (RFC 791) replaces the destination behind forward. It comes before
// source NAT, which the kernel applies at priority 100 whatever the priority of a chain of type nat is: so the source is
// still the pod's, and it is one of the host's only if the host sent the packet.
func (f *family) backstop() chain {
	local := slices.Concat(f.toAddress(f.ipAddresses()), []expr.Any{
		&expr.Fib{Register: reg0, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		verdict(expr.VerdictAccept),
	})
	return hooked(f.ipTable(), "backstop", nftables.ChainTypeFilter, nftables.ChainHookPostrouting, guardPriority,
		append([]nftRule{{"the host's own", local}}, f.refuse(f.ipAddresses())...)...)
}

// refuse drops every packet to the addresses of a set, whatever its protocol: a fragment, an authentication header or an
// unknown extension header can hide TCP from nftables and not from the receiver. UDP over IPv4 passes, because Google's
// metadata server is the name server at the same address. A fragment of UDP cannot become part of a TCP segment there:
// RFC 791 reassembles by protocol.
func (f *family) refuse(addresses *nftables.Set, prefix ...expr.Any) []nftRule {
	drop := nftRule{"guard", slices.Concat(prefix, f.toAddress(addresses), []expr.Any{verdict(expr.VerdictDrop)})}
	if f.v6 {
		return []nftRule{drop}
	}
	udp := slices.Concat(prefix, isProtocol(unix.IPPROTO_UDP), f.toAddress(addresses), []expr.Any{verdict(expr.VerdictAccept)})
	return []nftRule{{"UDP passes", udp}, drop}
}

// guards are the tables, and guarded the elements, of services that are only guarded.
func guards(services []netip.AddrPort) []table {
	var tables []table
	for _, m := range services {
		f := familyOf(m.Addr())
		tables = append(tables, table{Table: f.ipTable(), sets: []*nftables.Set{f.ipAddresses()}, chains: []chain{f.backstop(), f.guard()}})
	}
	return tables
}

func guarded(services []netip.AddrPort) []element {
	return Base{Metadata: services}.addresses((*family).ipAddresses)
}

// services are the elements that are the node's.
func (t *NFTablesBackend) services(base Base, bridged bool) []element {
	var elements []element
	if bridged {
		elements = t.ports.services(base)
	}
	if base.Guard {
		elements = append(elements, guarded(base.Metadata)...)
	}
	return slices.Concat(elements, base.elements((*family).ipServices), guarded(base.besides()))
}

// elements are the attachment's.
func (t *NFTablesBackend) elements(a Attachment) []element {
	elements := t.ports.elements(a)
	for _, r := range a.Redirections {
		elements = append(elements, a.element(r))
	}
	return elements
}

func (a Attachment) element(r Redirection) element {
	f := familyOf(r.Source)
	if a.Bridged {
		return element{f.bridged(), nftables.SetElement{Key: addrBytes(r.Source), Val: socketBytes(r.Proxy), Comment: a.ID}}
	}
	return element{f.routed(), nftables.SetElement{Key: holderBytes(a.HostLink, r.Source), Val: socketBytes(r.Proxy), Comment: a.ID}}
}

// Add implements Backend. The base is looked at each time, and made again where it is not whole.
func (t *NFTablesBackend) Add(_ context.Context, base Base, a Attachment) error {
	if err := t.Open(base, a); err != nil {
		return err
	}
	return base.guarding(func(base Base) error {
		return t.ports.replace(t.tables(base, a.Bridged), append(t.services(base, a.Bridged), t.elements(a)...), a.ID)
	}, t.unguarded)
}

func (t *NFTablesBackend) remove(a Attachment) (absent []Redirection, err error) {
	gone, err := t.ports.removeAll(a.ID)
	for _, r := range a.Redirections {
		e := a.element(r)
		if !slices.ContainsFunc(gone, func(g element) bool { return placeOf(g.set) == placeOf(e.set) && string(g.Key) == string(e.Key) }) {
			absent = append(absent, r)
		}
	}
	return absent, err
}

func (t *NFTablesBackend) removeLeftovers(id string) error { return t.ports.removeLeftovers(id) }

// Missing implements Backend.
func (t *NFTablesBackend) Missing(base Base, a Attachment) ([]string, error) {
	return t.ports.missing(t.tables(base, a.Bridged), append(t.services(base, a.Bridged), t.elements(a)...))
}

// missing names what is wanted and does not stand.
func (s *standing) missing(tables []table, wanted []element) []string {
	missing := s.lacks(tables)
	for _, e := range wanted {
		if !s.holds(e) {
			missing = append(missing, e.String())
		}
	}
	return missing
}

// String names an element for people.
func (e element) String() string {
	where := fmt.Sprintf("in %s of table %s %s", e.set.Name, familyName(e.set.Table.Family), Table)
	key := e.Key
	var link string
	if len(key) > unix.IFNAMSIZ+4 || len(key) == unix.IFNAMSIZ+4 && e.set.KeyType.Name == family4.holder().Name {
		link = unix.ByteSliceToString(key[:unix.IFNAMSIZ])
		key = key[unix.IFNAMSIZ:]
	}
	what := e.Comment
	if link != "" {
		what += " by " + link
	}
	for _, n := range []int{16, 4} {
		if len(key) >= n && (len(key) == n || len(key) == n+4) {
			ip, _ := netip.AddrFromSlice(key[:n])
			what += " from " + ip.String()
			break
		}
	}
	if e.set.IsMap && len(e.Val) > 4 {
		ip, _ := netip.AddrFromSlice(e.Val[:len(e.Val)-4])
		port := e.Val[len(e.Val)-4:]
		return fmt.Sprintf("redirection of %s to %s %s", what, netip.AddrPortFrom(ip, uint16(port[0])<<8|uint16(port[1])), where)
	}
	return fmt.Sprintf("entry of %s %s", what, where)
}
