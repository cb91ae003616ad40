package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Clear removes every rule, chain and table of ours from the node, in all forms and families, and the guard with them: what the
// rulesets were before the first Add. Other people's rules, and empty tables that an iptables command made for ours, stay. What is hidden
// from an iptables command (hiddenTable) is looked for by the services. It goes on after an error and returns all of them; what is gone
// already is none.
func (n *Node) Clear(ctx context.Context, services []netip.AddrPort) error {
	var errs []error
	for _, form := range []Form{NFT, Legacy} {
		t, err := n.IPTables(form)
		if err != nil {
			continue // what has no command has left no rule that could be removed
		}
		for _, family := range []netip.Addr{anyIPv4, anyIPv6} {
			if t.has(family) == nil {
				errs = append(errs, t.clear(ctx, family, services))
			}
		}
	}
	// The guard in nftables goes last: what the others still redirect or refuse, it has no part in.
	if err := n.bridges().clear(); !errors.Is(err, ErrUnsupported) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// clear removes what stands in one form and family, in one run for each table: an iptables table changes at once or not at all.
func (t *IPTables) clear(ctx context.Context, family netip.Addr, services []netip.AddrPort) error {
	tables := slices.DeleteFunc([]string{"nat", "filter", "mangle"}, func(table string) bool { return !t.ports.used(t.form, family.Is6(), table) })
	if len(tables) == 0 {
		return nil
	}
	s, err := t.save(ctx, family)
	if err != nil {
		return err
	}
	ipt, err := t.at(family)
	if err != nil {
		return err
	}
	changes := new(script)
	left := make(map[[2]string]bool) // tables and chains of iptables' own that a rule of ours goes from
	var errs []error
	for _, table := range tables {
		for _, place := range ourPlaces {
			chain, ours := strings.CutPrefix(place, table+" ")
			if !ours || chain == Chain {
				continue
			}
			for _, words := range s.rules[place] {
				if commentOf(words) == Comment {
					changes.add("-D", rule{table: table, chain: chain, spec: words})
					left[[2]string{table, chain}] = true
				}
			}
		}
		if !s.hidden[table] {
			continue
		}
		for _, metadata := range services {
			if metadata.Addr().Is6() != family.Is6() {
				continue
			}
			for _, r := range baseRules(metadata, true, true) {
				if r.table == table {
					was, err := deleteRule(ipt, r)
					errs = append(errs, err)
					left[[2]string{r.table, r.chain}] = was
				}
			}
		}
	}
	if slices.Contains(tables, "nat") {
		for _, chain := range []string{Chain, newChain} {
			there, err := chainExists(ipt, chain)
			if err != nil {
				errs = append(errs, err)
			}
			if there {
				changes.add("-F", rule{table: "nat", chain: chain})
				changes.add("-X", rule{table: "nat", chain: chain})
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%s: %w", t.form, err)
	}
	if err := t.restore(ctx, family.Is6(), changes); err != nil || t.form != NFT {
		return err
	}
	return t.ports.dropEmpty(familyOf(family).table, left)
}

// dropEmpty deletes those of the chains that hold nothing and let everything pass: iptables-nft makes them for a first rule, does not take
// them away with the last, and makes them again for whoever comes next.
func (k *nft) dropEmpty(family nftables.TableFamily, those map[[2]string]bool) error {
	conn, err := k.open()
	if err != nil {
		return err
	}
	chains, err := conn.ListChainsOfTableFamily(family)
	if err != nil {
		return supported(err)
	}
	for _, c := range chains {
		if !those[[2]string{c.Table.Name, c.Name}] || c.Hooknum == nil || c.Policy != nil && *c.Policy != nftables.ChainPolicyAccept {
			continue
		}
		if rules, err := conn.GetRules(c.Table, c); err != nil || len(rules) > 0 {
			continue
		}
		conn.DelChain(c)
		// Busy is one that somebody has put a rule into since.
		if err := conn.Flush(); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

// clear deletes our tables, and those of probes that died.
func (k *nft) clear() error {
	unlock, err := k.alone()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := k.endProbes(false); err != nil {
		return err
	}
	conn, err := k.open()
	if err != nil {
		return err
	}
	tables, err := listTables(conn)
	if err != nil {
		return err
	}
	gone := 0
	for _, t := range tables {
		if t.Name == Table && slices.Contains([]nftables.TableFamily{nftables.TableFamilyBridge, nftables.TableFamilyIPv4, nftables.TableFamilyIPv6}, t.Family) {
			conn.DelTable(t)
			gone++
		}
	}
	if gone == 0 {
		return nil
	}
	return supported(conn.Flush())
}
