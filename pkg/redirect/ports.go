package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
)

// ports is the table of the bridge family, which binds addresses to bridge ports. It sees a frame by the port that it enters
// or leaves by, which the IP layer above does not, whether bridge-nf is on or off:
//
//   - a request for the metadata service from a port's own address is marked, and one from an address that another port
//     holds is dropped there, before bridge, ARP or routing (one from nobody's address meets the guard, which answers);
//   - an answer of the service leaves by the port that holds the address, and by no other: whoever draws his neighbour's
//     frames to himself, by claiming his address (ARP, NDP) or his MAC address, gets none (but a reset, which says nothing,
//     and is the guard's quick word to a pod that holds no address yet);
//   - no frame goes from port to port that is bound for the service, or claims to come from it: who poses as the gateway
//     can neither pass requests on nor answer them, and where the way out is itself a port of the bridge, this is the guard.
//
// A chain at the veth's own ingress could do the first, too, but not behind a tc filter that takes packets elsewhere and
// brings them back, as the bandwidth plugin's does: what comes back passes the bridge, and the ingress no more.
type ports struct{ *nft }

// beforeBridgeNF is the priority of the chains: bridge-nf, which hands frames to the IP layer's rules, comes at 0
// (linux/netfilter_bridge.h, NF_BR_PRI_BRNF), and ebtables' tables from -300 on.
const beforeBridgeNF = -350

// unmarkPriority is just behind destination NAT (linux/netfilter_ipv4.h, NF_IP_PRI_NAT_DST), before the routing: no rule of
// another program for a mark is ever asked about ours.
const unmarkPriority = -99

func (base Base) mark() uint32 {
	if base.Mark == 0 {
		return DefaultMark
	}
	return base.Mark
}

// DefaultMark is a bit that none of the programs uses which are known to mark packets: kube-proxy has 0x4000 and 0x8000,
// Cilium 0x0f00 and the upper half, Calico the upper half, portmap 0x2000, the AWS VPC CNI 0x80.
const DefaultMark = 0x1000

func bridgeTable() *nftables.Table {
	return &nftables.Table{Name: Table, Family: nftables.TableFamilyBridge}
}

func (f *family) ipTable() *nftables.Table {
	return &nftables.Table{Name: Table, Family: f.table}
}

// The bridge table's sets: which port holds which address, and which addresses are held at all.
func (f *family) heldSet() *nftables.Set { return set(bridgeTable(), "held"+f.suffix, f.addr, false) }
func (f *family) holders() *nftables.Set {
	return set(bridgeTable(), "holders"+f.suffix, f.holder(), true)
}
func (f *family) bridgeServices() *nftables.Set {
	return set(bridgeTable(), "metadata"+f.suffix, f.socket(), true)
}

func (f *family) bridgeAddresses() *nftables.Set {
	return set(bridgeTable(), "addresses"+f.suffix, f.addr, false)
}

func hooked(t *nftables.Table, name string, kind nftables.ChainType, hook *nftables.ChainHook, priority int32, rules ...nftRule) chain {
	accept := nftables.ChainPolicyAccept
	return chain{&nftables.Chain{
		Name: name, Table: t, Type: kind, Hooknum: hook, Priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)), Policy: &accept,
	}, rules}
}

// tables are the bridge table and, in each family's own, what takes the mark off again.
func (p *ports) tables(base Base) []table {
	t := bridgeTable()
	base.Guard = base.Guard || p.guarded()
	bridge := table{Table: t}
	enter := append(hiddenTags(), fragments()...)
	var pass, leave []nftRule
	for _, f := range []*family{family4, family6} {
		services, holders, held := f.bridgeServices(), f.holders(), f.heldSet()
		bridge.sets = append(bridge.sets, services, holders, held)
		to := append(f.isFamily(), f.toService(services)...)
		from := append(f.isFamily(), f.fromService(services)...)
		own := slices.Concat(to, f.held(expr.MetaKeyIIFNAME, f.saddr, holders, false))
		others := slices.Concat(to, []expr.Any{f.load(f.saddr, reg0), &expr.Lookup{SourceRegister: reg0, SetName: held.Name}})
		enter = append(enter,
			nftRule{fmt.Sprintf("own address, mark %#x", base.mark()), append(slices.Concat(own, setMark(base.mark())), verdict(expr.VerdictAccept))},
			nftRule{"another's address", append(others, verdict(expr.VerdictDrop))})
		if base.Guard {
			pass = append(pass, f.refuse(f.bridgeAddresses(), f.isFamily()...)...)
		}
		pass = append(pass, nftRule{"no port answers", append(from, verdict(expr.VerdictDrop))})
		strange := slices.Concat(from, noReset(), f.held(expr.MetaKeyOIFNAME, f.daddr, holders, true))
		leave = append(leave, nftRule{"answer to the holder's port only", append(strange, verdict(expr.VerdictDrop))})
	}
	bridge.sets = append(bridge.sets, family4.bridgeAddresses(), family6.bridgeAddresses())
	bridge.chains = []chain{
		hooked(t, "enter", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeBridgeNF, enter...),
		hooked(t, "pass", nftables.ChainTypeFilter, nftables.ChainHookForward, beforeBridgeNF, pass...),
		hooked(t, "leave", nftables.ChainTypeFilter, nftables.ChainHookOutput, beforeBridgeNF, leave...),
	}
	tables := []table{bridge}
	for _, f := range base.families() {
		t := f.ipTable()
		tables = append(tables, table{Table: t, chains: []chain{f.unmark(t, base)}})
	}
	return tables
}

// guarded tells whether the bridge is guarded already, for another of the node's configurations: that is never taken away.
func (p *ports) guarded() bool {
	conn, err := p.open()
	if err != nil {
		return false // and whoever reads the tables next says so
	}
	rules, _ := conn.GetRules(bridgeTable(), &nftables.Chain{Name: "pass", Table: bridgeTable()})
	return slices.ContainsFunc(rules, func(r *nftables.Rule) bool {
		comment, _ := userdata.GetString(r.UserData, userdata.TypeComment)
		return comment == "guard"
	})
}

func (f *family) unmark(t *nftables.Table, base Base) chain {
	return hooked(t, "unmark", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, unmarkPriority,
		nftRule{fmt.Sprintf("mark %#x", base.mark()), append(marked(base.mark()), clearMark(base.mark())...)})
}

// families are those of the base's services.
func (base Base) families() []*family {
	var all []*family
	for _, m := range base.Metadata {
		if f := familyOf(m.Addr()); !slices.Contains(all, f) {
			all = append(all, f)
		}
	}
	return all
}

// services are the elements of the bridge table that are the node's: of all families, because a pod chooses what it sends.
func (p *ports) services(base Base) []element {
	base.Metadata = append(slices.Clone(base.Metadata), base.besides()...)
	elements := base.elements((*family).bridgeServices)
	return append(elements, base.addresses((*family).bridgeAddresses)...)
}

// addresses are the base's services without their ports, in a set of each family's.
func (base Base) addresses(set func(*family) *nftables.Set) []element {
	var elements []element
	for _, m := range base.Metadata {
		elements = append(elements, element{set(familyOf(m.Addr())), nftables.SetElement{Key: addrBytes(m.Addr()), Comment: Comment}})
	}
	return elements
}

// elements are the base's services in a set of each family's.
func (base Base) elements(set func(*family) *nftables.Set) []element {
	var elements []element
	for _, m := range base.Metadata {
		elements = append(elements, element{set(familyOf(m.Addr())), nftables.SetElement{Key: socketBytes(m), Comment: Comment}})
	}
	return elements
}

// elements are the attachment's in the bridge table.
func (p *ports) elements(a Attachment) []element {
	if !a.Bridged || len(a.Redirections) == 0 {
		return nil
	}
	var elements []element
	for _, r := range a.Redirections {
		f := familyOf(r.Source)
		elements = append(elements,
			element{f.holders(), nftables.SetElement{Key: holderBytes(a.HostLink, r.Source), Comment: a.ID}},
			element{f.heldSet(), nftables.SetElement{Key: addrBytes(r.Source), Comment: a.ID}})
	}
	return elements
}

// services are of a Metadata that redirections go to.
func (a Attachment) services() []netip.AddrPort {
	var all []netip.AddrPort
	for _, r := range a.Redirections {
		if !slices.Contains(all, r.Metadata) {
			all = append(all, r.Metadata)
		}
	}
	return all
}

// besides are the services that are only guarded: none of their family is redirected.
func (base Base) besides() []netip.AddrPort {
	redirected := base.families()
	return slices.DeleteFunc(slices.Clone(base.Guarded), func(m netip.AddrPort) bool { return slices.Contains(redirected, familyOf(m.Addr())) })
}

// guarding does something with a base. Where the kernel lacks what that takes, it does without Guarded, for it may have the
// other tables all the same, and leaves the services that nothing else guards to otherwise.
func (base Base) guarding(do func(Base) error, otherwise func([]netip.AddrPort, error) error) error {
	err := do(base)
	if !errors.Is(err, ErrUnsupported) || len(base.Guarded) == 0 {
		return err
	}
	if err := otherwise(base.besides(), err); err != nil {
		return err
	}
	base.Guarded = nil
	return do(base)
}

// beside is what iptables wants of nftables next to it.
func (p *ports) beside(base Base, bridged bool) (tables []table, elements []element) {
	if bridged {
		tables, elements = p.tables(base), p.services(base)
	}
	return append(tables, guards(base.Guarded)...), append(elements, guarded(base.Guarded)...)
}

func (p *ports) add(base Base, a Attachment) error {
	tables, elements := p.beside(base, a.Bridged)
	if len(tables) == 0 {
		return nil
	}
	return p.replace(tables, append(elements, p.elements(a)...), a.ID)
}
