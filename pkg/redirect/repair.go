package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// Wanted is what a node's rules are to be.
type Wanted struct {
	Base Base
	// Chosen is the form that the base is wanted in, besides those that attachments are in.
	Chosen Form
	// Attachments are all of the node, by the form of their rules, but for those that are redirected inside their pod.
	Attachments map[Form][]Attachment
	// Everywhere has forms looked at, too, that nothing is wanted in.
	Everywhere bool
}

// Repair makes the node's rules what is wanted: it makes what is missing, removes what carries the identity of an attachment
// that is none of the wanted, and leaves all else alone. What it did is in the list, a line each; it looks only, where dry
// is true. Where nothing is wrong it costs one process run for each family of each form of iptables that is in use.
func (n *Node) Repair(ctx context.Context, w Wanted, dry bool) ([]string, error) {
	var did []string
	var alone []netip.AddrPort // what iptables has to guard, for want of nftables
	var guard Form             // and in which form
	err := w.Base.guarding(func(base Base) (err error) {
		w.Base = base
		did, err = n.repairNFT(w, dry)
		return err
	}, func(services []netip.AddrPort, unsupported error) error {
		t, err := n.guardCommand(w.Chosen)
		if err != nil {
			return n.unguarded(services, errors.Join(unsupported, err))
		}
		guard = t.form
		var none []netip.AddrPort
		alone, none = t.withCommand(services)
		return n.unguarded(none, unsupported)
	})
	errs := []error{err}
	for _, form := range []Form{NFT, Legacy} {
		inUse := form == w.Chosen || form == guard || len(w.Attachments[form]) > 0
		if !inUse && !w.Everywhere {
			continue
		}
		t, err := n.IPTables(form)
		if err != nil {
			if inUse {
				errs = append(errs, err)
			}
			continue
		}
		if err := t.inKernel(); err != nil {
			if inUse {
				errs = append(errs, err)
			}
			continue
		}
		base := w.Base
		if form == guard {
			base.Metadata = append(slices.Clone(base.Metadata), alone...)
		}
		if !inUse {
			base = Base{}
		}
		lines, err := t.repair(ctx, base, w.Attachments[form], dry)
		did, errs = append(did, lines...), append(errs, err)
	}
	for form, attachments := range w.Attachments {
		if !slices.Contains(allForms, form) {
			errs = append(errs, fmt.Errorf("rules of %d attachments, %s first: %w of the form %q", len(attachments), attachments[0].ID, ErrNoIPTables, form))
		}
	}
	return did, errors.Join(errs...)
}

// guardCommand returns the iptables that makes the guard on a kernel whose nftables cannot: the chosen form, or the legacy
// one where the chosen form needs nf_tables and the kernel has none.
func (n *Node) guardCommand(chosen Form) (*IPTables, error) {
	if chosen != NFT || n.bridges().inKernel() != nil {
		chosen = Legacy
	}
	return n.IPTables(chosen)
}

// IsMissing tells whether a line of Repair is of something that was not there. The others are of what is nobody's.
func IsMissing(line string) bool { return strings.HasPrefix(line, "missing: ") }

// repairNFT is for what stands in nftables: all of it is looked at together, for the bridge's table is everybody's.
func (n *Node) repairNFT(w Wanted, dry bool) ([]string, error) {
	own := n.nftables()
	var wanted []element
	bridged, essential := false, false
	for form, attachments := range w.Attachments {
		for _, a := range attachments {
			bridged = bridged || a.Bridged
			if form == NFTables {
				wanted = append(wanted, own.elements(a)...)
			} else {
				essential = essential || a.Mark != 0
				wanted = append(wanted, n.ports.elements(a)...)
			}
		}
	}
	var tables []table
	var nodes []element
	if w.Chosen == NFTables || len(w.Attachments[NFTables]) > 0 {
		essential = true
		tables, nodes = own.tables(w.Base, bridged), own.services(w.Base, bridged)
	} else {
		tables, nodes = n.ports.beside(w.Base, bridged)
	}
	wanted = append(wanted, nodes...)
	did, err := n.ports.repair(tables, wanted, dry)
	if err == nil {
		var ended []string
		ended, err = n.ports.endProbes(dry)
		did = append(did, ended...)
	}
	if errors.Is(err, ErrUnsupported) && !essential && len(w.Base.Guarded) == 0 {
		err = nil
	}
	return did, err
}

// repair is Repair for one form of iptables.
func (t *IPTables) repair(ctx context.Context, base Base, attachments []Attachment, dry bool) ([]string, error) {
	var did []string
	var errs []error
	for _, family := range []netip.Addr{anyIPv4, anyIPv6} {
		var metadata netip.AddrPort
		for _, m := range base.Metadata {
			if m.Addr().Is6() == family.Is6() {
				metadata = m
			}
		}
		if err := t.has(family); err != nil {
			if metadata.IsValid() {
				errs = append(errs, err)
			}
			continue
		}
		if !metadata.IsValid() && !t.ports.used(t.form, family.Is6(), "nat") {
			continue
		}
		lines, err := t.repairFamily(ctx, family, metadata, base.Guard, attachments, dry)
		did, errs = append(did, lines...), append(errs, err)
	}
	return did, errors.Join(errs...)
}

func (t *IPTables) repairFamily(ctx context.Context, family netip.Addr, metadata netip.AddrPort, guard bool, attachments []Attachment, dry bool) ([]string, error) {
	s, err := t.save(ctx, family)
	if err != nil {
		return nil, err
	}
	var wanted []rule
	for _, a := range attachments {
		if err := a.validate(); err != nil {
			return nil, err
		}
		for _, r := range a.Redirections {
			if r.Source.Is6() == family.Is6() {
				wanted = append(wanted, a.rule(r))
			}
		}
	}
	var did []string
	if metadata.IsValid() {
		for _, r := range baseRules(metadata, guard, len(wanted) > 0) {
			there, err := t.stands(s, family, r)
			if err != nil {
				return nil, err
			}
			if !there {
				did = append(did, fmt.Sprintf("missing: %s (%s)", r.what, t.form))
			}
		}
	}
	wrongBase := len(did) > 0
	changes := new(script)
	moves := false
	if metadata.IsValid() && len(wanted) > 0 {
		lines, err := t.precedence(ctx, s, metadata, changes)
		if err != nil {
			return nil, err
		}
		did, moves = append(did, lines...), len(lines) > 0
	}
	there := make(map[string]int)
	for _, r := range wanted {
		there[canon(r.spec)]++
	}
	for _, words := range s.rules["nat "+Chain] {
		key := canon(words)
		if there[key] > 0 {
			there[key]--
			continue
		}
		// A rule without an identity is not ours to judge.
		if id := commentOf(words); strings.Contains(id, "@") {
			did = append(did, fmt.Sprintf("stale: rule of %s (%s)", id, t.form))
			changes.add("-D", rule{table: "nat", chain: Chain, spec: words})
		}
	}
	for _, r := range wanted {
		if key := canon(r.spec); there[key] > 0 {
			there[key]--
			did = append(did, fmt.Sprintf("missing: %s (%s)", r.what, t.form))
			changes.add("-A", r)
		}
	}
	if dry || len(did) == 0 {
		return did, nil
	}
	if wrongBase {
		ipt, err := t.at(family)
		if err != nil {
			return did, err
		}
		if err := t.makeBase(ctx, ipt, metadata, guard, len(wanted) > 0); err != nil {
			return did, err
		}
	}
	if err := t.restore(ctx, family.Is6(), changes); err != nil {
		return did, err
	}
	if moves {
		t.moved[family.Is6()] = append(t.moved[family.Is6()], t.now())
	}
	return did, nil
}

// saved is what stands of the chains that we have rules in, and of the nat table.
type saved struct {
	rules map[string][][]string // the words of a rule without quotes, by table and chain
	nat   map[string][]string   // all rules of the nat table, as they were written, by chain
	// hidden are the tables that hold a rule of nftables for which iptables has no words. It lists nothing of such a table,
	// and finds and changes rules in it all the same.
	hidden map[string]bool
}

// hiddenTable is how iptables-nft-save says so, on standard output and with success (iptables/xtables-save.c).
var hiddenTable = regexp.MustCompile("^# Table `(\\w+)' is incompatible")

// save reads all tables of a family in one run, and in one more what is hidden of our own chain. (iptables-save makes no
// table that is not there.)
func (t *IPTables) save(ctx context.Context, family netip.Addr) (*saved, error) {
	command, err := t.find(t.form, family.Is6())
	if err != nil {
		return nil, err
	}
	out, err := run(ctx, "", command+"-save")
	if err != nil {
		return nil, err
	}
	s := &saved{rules: make(map[string][][]string), nat: make(map[string][]string), hidden: make(map[string]bool)}
	table := ""
	for line := range strings.Lines(out) {
		if name, ok := strings.CutPrefix(line, "*"); ok {
			table = strings.TrimSpace(name)
		} else if named := hiddenTable.FindStringSubmatch(line); named != nil {
			s.hidden[named[1]] = true
		} else {
			s.keep(table, line)
		}
	}
	if !s.hidden["nat"] {
		return s, nil
	}
	ipt, err := t.at(family)
	if err != nil {
		return nil, err
	}
	if there, err := chainExists(ipt, Chain); err != nil || !there {
		return s, err
	}
	// Without a list nothing may be taken for missing: it would be made again in each round.
	lines, err := ipt.List("nat", Chain)
	for _, line := range lines {
		s.keep("nat", line)
	}
	return s, classify("chain "+Chain, err)
}

// keep keeps the rule of a line, if it is in a chain of ours or in the nat table, whose chains it keeps too.
func (s *saved) keep(table, line string) {
	if chain, ok := strings.CutPrefix(line, ":"); ok && table == "nat" {
		chain, _, _ = strings.Cut(chain, " ")
		s.nat[chain] = nil
	}
	spec, ok := strings.CutPrefix(line, "-A ")
	if !ok {
		return
	}
	chain, spec, _ := strings.Cut(strings.TrimSpace(spec), " ")
	if table == "nat" {
		s.nat[chain] = append(s.nat[chain], spec)
	}
	if at := table + " " + chain; slices.Contains(ourPlaces, at) {
		s.rules[at] = append(s.rules[at], unquoted(strings.Fields(spec)))
	}
}

// ourPlaces are the chains that we have rules in, with their tables.
var ourPlaces = []string{"nat " + Chain, "nat PREROUTING", "filter FORWARD", "mangle POSTROUTING"}

func unquoted(words []string) []string {
	for i := range words {
		if strings.HasPrefix(words[i], `"`) == strings.HasSuffix(words[i], `"`) { // else it is one of several, which commentOf tells
			words[i] = strings.Trim(words[i], `"`)
		}
	}
	return words
}

// stands tells whether a rule is among what was saved, or found where that is hidden.
func (t *IPTables) stands(s *saved, family netip.Addr, r rule) (bool, error) {
	if s.hidden[r.table] {
		ipt, err := t.at(family)
		if err != nil {
			return false, err
		}
		return standsFirst(ipt, r)
	}
	want := canon(r.spec)
	return slices.ContainsFunc(s.rules[r.table+" "+r.chain], func(words []string) bool { return canon(words) == want }), nil
}

// canon makes two spellings of a rule one: the commands list the options of a rule in an order of their own, and no word of
// ours is an option's in one place and another's in another.
func canon(words []string) string { return strings.Join(slices.Sorted(slices.Values(words)), " ") }
