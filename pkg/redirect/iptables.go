package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"
)

// IPTables programs rules by the node's iptables and ip6tables in one form. It is not for concurrent use.
type IPTables struct {
	form  Form
	find  func(name Form, v6 bool) (path string, err error)
	lock  func(context.Context) (unlock func(), err error)
	ports *ports
	// unbound is Node.Unbound, and unguarded its twin.
	unbound   func(id string, err error)
	unguarded func([]netip.AddrPort, error) error
	// conflict is Node.Conflict, or does nothing.
	conflict func(what string)
	now      func() time.Time

	// By whether they are for IPv6:
	moved    map[bool][]time.Time // when Repair moved the jump to the first place
	conceded map[bool]string      // the rule above the jump that Repair does not move it over again
	opened   map[bool]*iptables.IPTables
}

// Form is the form that the rules are in.
func (t *IPTables) Form() Form { return t.form }

// at is the command for the family of ip. To open it is a process run, which asks for the version.
func (t *IPTables) at(ip netip.Addr) (*iptables.IPTables, error) {
	v6 := ip.Is6()
	if ipt := t.opened[v6]; ipt != nil {
		return ipt, nil
	}
	path, err := t.find(t.form, v6)
	if err != nil {
		return nil, err
	}
	family := iptables.ProtocolIPv4
	if v6 {
		family = iptables.ProtocolIPv6
	}
	ipt, err := iptables.New(iptables.Path(path), iptables.IPFamily(family), iptables.Timeout(lockSeconds))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	t.opened[v6] = ipt
	return ipt, nil
}

// Open implements Backend.
func (t *IPTables) Open(base Base, a Attachment) error {
	if err := a.validate(); err != nil {
		return err
	}
	if err := t.inKernel(); err != nil {
		return err
	}
	for _, metadata := range base.Metadata {
		if err := t.has(metadata.Addr()); err != nil {
			return err
		}
	}
	return nil
}

// inKernel returns an error that is ErrUnsupported where the kernel lacks what the form needs. iptables-nft itself exits there
// with the status that it has for the lock.
func (t *IPTables) inKernel() error {
	if t.form != NFT {
		return nil
	}
	if err := t.ports.inKernel(); err != nil {
		return fmt.Errorf("%s: %w", t.form, err)
	}
	return nil
}

// has tells whether the node has the command for the family of ip.
func (t *IPTables) has(ip netip.Addr) error {
	_, err := t.find(t.form, ip.Is6())
	return err
}

// Add implements Backend. In the steady state a family costs one process run, which checks the base and appends the rules,
// all or none. Only where that fails the base is made, and the run repeated.
//
// Add also puts the jump before other programs' rules that could take requests: CRI-O calls CHECK
// right after ADD, and such a rule would fail it. With iptables-legacy, and with iptables-nft if the
// jump is not the very first rule, this costs a run of the -save command.
func (t *IPTables) Add(ctx context.Context, base Base, a Attachment) error {
	if err := t.Open(base, a); err != nil {
		return err
	}
	// Before the rule: a mark that nobody looks for does no harm.
	if err := t.beside(ctx, base, a); err != nil {
		return err
	}
	for _, metadata := range base.Metadata {
		if err := t.add(ctx, metadata, base.Guard, a.rules(metadata)); err != nil {
			return err
		}
	}
	return nil
}

// beside makes what iptables has next to it in nftables: the bridge's ports, and the guard for all families.
func (t *IPTables) beside(ctx context.Context, base Base, a Attachment) error {
	err := base.guarding(func(base Base) error { return t.ports.add(base, a) },
		func(alone []netip.AddrPort, err error) error { return t.guardAlone(ctx, alone, err) })
	if !errors.Is(err, ErrUnsupported) || a.Mark != 0 {
		return err
	}
	if a.Bridged && t.unbound != nil {
		t.unbound(a.ID, err)
	}
	return nil
}

// guardAlone makes the guard of families in which nothing is redirected, on a kernel without nftables.
func (t *IPTables) guardAlone(ctx context.Context, alone []netip.AddrPort, unsupported error) error {
	for _, service := range alone {
		err := t.has(service.Addr())
		if err == nil {
			err = t.add(ctx, service, true, nil)
		}
		if errors.Is(err, ErrBusy) {
			return err
		}
		if err != nil {
			t.unguarded([]netip.AddrPort{service}, errors.Join(unsupported, err))
		}
	}
	return nil
}

func (t *IPTables) add(ctx context.Context, metadata netip.AddrPort, guard bool, rules []rule) error {
	below := false
	if len(rules) > 0 {
		var err error
		if below, err = t.isJumpBelow(ctx, metadata); err != nil {
			return err
		}
	}
	s := new(script)
	for _, r := range baseRules(metadata, guard, len(rules) > 0) {
		if below && r.table == "nat" {
			s.add("-D", r)
			s.add("-I", r)
		} else {
			s.add("-C", r)
		}
	}
	for _, r := range rules {
		s.add("-A", r)
	}
	v6 := metadata.Addr().Is6()
	err := t.restore(ctx, v6, s)
	if err == nil || errors.Is(err, ErrBusy) {
		return err
	}
	ipt, err := t.at(metadata.Addr())
	if err != nil {
		return err
	}
	if err := t.makeBase(ctx, ipt, metadata, guard, len(rules) > 0); err != nil {
		return err
	}
	if err := t.restore(ctx, v6, s); err != nil {
		return fmt.Errorf("%v: %w", rules, err)
	}
	return nil
}

// makeBase makes what is missing of the base, the guard first: so nothing is redirected on a node that is not guarded. Its
// order is for a process that is killed between two steps, too: what Add looks for afterwards appears last, the second half
// of the guard after the first, and the chain's name after the jump. The chain and the jump are made only where something
// is redirected: a table that is made for nothing costs each packet. The lock keeps two first ADDs from inserting a rule
// twice.
func (t *IPTables) makeBase(ctx context.Context, ipt *iptables.IPTables, metadata netip.AddrPort, guard, redirected bool) error {
	unlock, err := t.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if guard {
		for _, r := range []rule{refusal(metadata), backstop(metadata)} {
			if err := insertMissing(ipt, r); err != nil {
				return err
			}
		}
	}
	if !redirected {
		return nil
	}
	there, err := chainExists(ipt, Chain)
	if err != nil {
		return err
	}
	if !there {
		return makeChain(ipt, metadata)
	}
	return insertMissing(ipt, jump(metadata, Chain))
}

// newChain is the chain's name until its jump stands.
const newChain = Chain + "-NEW"

// makeChain makes the chain with its jump under another name. A jump follows its chain when that is renamed.
func makeChain(ipt *iptables.IPTables, metadata netip.AddrPort) error {
	there, err := chainExists(ipt, newChain)
	if err != nil {
		return err
	}
	if !there {
		if err := ipt.NewChain("nat", newChain); err != nil {
			return classify("chain "+newChain, err)
		}
	}
	if err := insertMissing(ipt, jump(metadata, newChain)); err != nil {
		return err
	}
	return classify("chain "+Chain, ipt.RenameChain("nat", newChain, Chain))
}

func chainExists(ipt *iptables.IPTables, name string) (bool, error) {
	there, err := ipt.ChainExists("nat", name)
	return there, classify("chain "+name, err)
}

// remove implements Backend. In the steady state a family costs one process run; only where a rule is missing they are
// looked for one by one.
func (t *IPTables) remove(a Attachment) (absent []Redirection, err error) {
	if err := a.validate(); err != nil {
		return nil, err
	}
	ended := func() error { return nil }
	if a.Bridged {
		if ended, err = t.ports.removing(a.ID); err != nil {
			return nil, err
		}
	}
	var errs []error
	families := make(map[bool][]Redirection)
	for _, r := range a.Redirections {
		families[r.Source.Is6()] = append(families[r.Source.Is6()], r)
	}
	for v6, redirections := range families {
		s := new(script)
		for _, r := range redirections {
			s.add("-D", a.rule(r))
		}
		err := t.restore(context.Background(), v6, s)
		if err == nil {
			continue
		}
		if errors.Is(err, ErrBusy) {
			errs = append(errs, err)
			continue
		}
		missing, err := t.removeEach(a, redirections)
		absent, errs = append(absent, missing...), append(errs, err)
	}
	return absent, errors.Join(append(errs, ended())...)
}

func (t *IPTables) removeEach(a Attachment, redirections []Redirection) (absent []Redirection, err error) {
	var errs []error
	for _, r := range redirections {
		ipt, err := t.at(r.Source)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		there, err := deleteRule(ipt, a.rule(r))
		if err != nil {
			errs = append(errs, err)
		} else if !there {
			absent = append(absent, r)
		}
	}
	return absent, errors.Join(errs...)
}

// Missing implements Backend.
func (t *IPTables) Missing(base Base, a Attachment) ([]string, error) {
	services := base.Metadata
	tables, elements := t.ports.beside(base, a.Bridged)
	missing, err := t.ports.missing(tables, append(elements, t.ports.elements(a)...))
	if errors.Is(err, ErrUnsupported) && a.Mark == 0 {
		alone, _ := t.withCommand(base.besides())
		services, err = append(slices.Clone(services), alone...), nil
	}
	if err != nil {
		return nil, err
	}
	for _, metadata := range services {
		redirections := a.rules(metadata)
		lacking, err := t.missing(metadata, base.Guard, redirections)
		if err != nil {
			return nil, err
		}
		missing = append(missing, lacking...)
	}
	return missing, nil
}

func (t *IPTables) missing(metadata netip.AddrPort, guard bool, redirections []rule) (missing []string, err error) {
	ctx, family := context.Background(), metadata.Addr()
	s, err := t.save(ctx, family)
	if err != nil {
		return nil, err
	}
	for _, r := range append(baseRules(metadata, guard, len(redirections) > 0), redirections...) {
		there, err := t.stands(s, family, r)
		if err != nil {
			return nil, err
		}
		if !there {
			missing = append(missing, r.what)
		}
	}
	if len(redirections) == 0 {
		return missing, nil
	}
	above, err := t.aboveJump(s, metadata)
	if err != nil {
		return nil, err
	}
	if above != "" {
		missing = append(missing, firstPlace(above))
	}
	chains, err := t.earlierChains(ctx, family)
	for _, chain := range chains {
		missing = append(missing, "precedence over the NAT "+chain)
	}
	return missing, err
}

// withCommand parts the services of the families that the node has a command for from the others.
func (t *IPTables) withCommand(services []netip.AddrPort) (with, without []netip.AddrPort) {
	for _, m := range services {
		if t.has(m.Addr()) == nil {
			with = append(with, m)
		} else {
			without = append(without, m)
		}
	}
	return with, without
}

// exists is false too where the rule's chain or its target is missing: for a jump to a chain that is not there iptables
// has another exit status.
func exists(ipt *iptables.IPTables, r rule) (bool, error) {
	there, err := ipt.Exists(r.table, r.chain, r.spec...)
	if exit := (*iptables.Error)(nil); errors.As(err, &exit) && exit.IsNotExist() {
		return false, nil
	}
	return there, classify(r.what, err)
}

// unreadable is what iptables-nft says at such a rule (iptables/nft-ruleparse.c).
const unreadable = "Parsing nftables rule failed"

// standsFirst is exists for a rule of the base, whose place is the first. In a chain with a rule of nftables that iptables has
// no words for, it finds what stands above that one and fails at what does not: which is missing, then, and will be found.
func standsFirst(ipt *iptables.IPTables, r rule) (bool, error) {
	there, err := exists(ipt, r)
	if exit := (*iptables.Error)(nil); errors.As(err, &exit) && strings.Contains(exit.Error(), unreadable) {
		return false, nil
	}
	return there, err
}

func insertMissing(ipt *iptables.IPTables, r rule) error {
	there, err := standsFirst(ipt, r)
	if err != nil || there {
		return err
	}
	return classify(r.what, ipt.Insert(r.table, r.chain, 1, r.spec...))
}

// deleteRule deletes a rule, and tells whether it was there. iptables says the same of a rule that is missing and of one
// that it failed to delete, so the second is found out by asking for it.
func deleteRule(ipt *iptables.IPTables, r rule) (was bool, err error) {
	failed := ipt.Delete(r.table, r.chain, r.spec...)
	if failed == nil {
		return true, nil
	}
	if err := classify(r.what, failed); errors.Is(err, ErrBusy) {
		return false, err
	}
	there, err := exists(ipt, r)
	if err != nil {
		return false, err
	}
	if there {
		return true, classify(r.what, failed)
	}
	return false, nil
}

// classify says what a command was for, and tells a passing failure by iptables' exit status.
func classify(what string, err error) error {
	if err == nil {
		return nil
	}
	var exit *iptables.Error
	if errors.As(err, &exit) && exit.ExitStatus() == resourceProblem {
		return fmt.Errorf("%s: %w: %w", what, ErrBusy, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
