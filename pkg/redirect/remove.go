package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

var (
	anyIPv4 = netip.IPv4Unspecified()
	anyIPv6 = netip.IPv6Unspecified()
)

// Remove deletes an attachment's rules: those of the form that made them first, and what is not found there in the others.
// In the steady state a family costs one process run, or none with nftables. Rules that are gone already are no error; an
// error that is ErrBusy may pass, and any other leaves rules behind, which a later Remove finds again.
func (n *Node) Remove(made Form, a Attachment) error {
	if a.Netns != "" {
		return n.removeInPod(a)
	}
	order := []Form{made}
	for _, form := range allForms {
		if form != made {
			order = append(order, form)
		}
	}
	var errs []error
	if !slices.Contains(allForms, made) {
		order = allForms
		errs = append(errs, fmt.Errorf("rules of %s: %w of the form %q, which made them", a.ID, ErrNoIPTables, made))
	}
	for _, form := range order {
		if len(a.Redirections) == 0 {
			break
		}
		t, err := n.Backend(form)
		if err != nil {
			if form == made {
				errs = append(errs, fmt.Errorf("rules of %s: %w", a.ID, err))
			}
			continue
		}
		usable, rest := n.split(a.Redirections, form)
		a.Redirections = usable
		absent, err := t.remove(a)
		if err != nil {
			errs = append(errs, fmt.Errorf("rules of %s: %w", a.ID, err))
		}
		a.Redirections = append(absent, rest...)
	}
	return errors.Join(errs...)
}

// split parts the redirections whose rules can stand in a form from those whose family has no table in it.
func (n *Node) split(all []Redirection, form Form) (usable, rest []Redirection) {
	for _, r := range all {
		if n.bridges().used(form, r.Source.Is6(), "nat") {
			usable = append(usable, r)
		} else {
			rest = append(rest, r)
		}
	}
	return usable, rest
}

// RemoveLeftovers deletes the rules that carry an attachment's identity, in all forms and families: it is for an
// attachment whose record is missing or cannot be read. No other rule is touched, and nothing to remove is no error.
func (n *Node) RemoveLeftovers(id string) error {
	var errs []error
	for _, form := range allForms {
		b, err := n.Backend(form)
		if err != nil {
			continue // what has no command has left no rule that could be removed
		}
		if err := b.removeLeftovers(id); err != nil {
			errs = append(errs, fmt.Errorf("leftover rules of %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// removeLeftovers implements Backend.
func (t *IPTables) removeLeftovers(id string) error {
	errs := []error{t.ports.removeLeftovers(id)}
	for _, family := range []netip.Addr{anyIPv4, anyIPv6} {
		if t.has(family) == nil && t.ports.used(t.form, family.Is6(), "nat") {
			errs = append(errs, t.removeLeftoversOf(family, id))
		}
	}
	return errors.Join(errs...)
}

func (t *IPTables) removeLeftoversOf(family netip.Addr, id string) error {
	ipt, err := t.at(family)
	if err != nil {
		return err
	}
	lines, err := ipt.List("nat", Chain)
	if err != nil {
		if err = classify("chain "+Chain, err); errors.Is(err, ErrBusy) {
			return err
		}
		return nil // no chain, and so no rule
	}
	var errs []error
	for _, line := range lines {
		spec := strings.Fields(line)
		if len(spec) < 2 || spec[0] != "-A" || spec[1] != Chain || commentOf(spec) != id {
			continue
		}
		for i := range spec {
			spec[i] = strings.Trim(spec[i], `"`)
		}
		if _, err := deleteRule(ipt, rule{what: "rule " + line, table: "nat", chain: Chain, spec: spec[2:]}); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// commentOf is the comment of a rule as iptables lists it. One of ours is a single word; a quoted one of several is
// nobody's identity, and its first word has only one quote.
func commentOf(spec []string) string {
	for i, word := range spec[:len(spec)-1] {
		if word != "--comment" {
			continue
		}
		comment := spec[i+1]
		if strings.HasPrefix(comment, `"`) != strings.HasSuffix(comment, `"`) {
			return ""
		}
		return strings.Trim(comment, `"`)
	}
	return ""
}
