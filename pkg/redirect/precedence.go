package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// The first NAT rule that matches a connection decides where it goes. The nftables backend has a chain of an earlier priority.
// The redirections of iptables share one chain and one priority with other programs, which may come before them in two ways:
// by a rule above the jump, or by a NAT chain of their own that the kernel runs before that of iptables.

// natPriority is the priority of iptables' nat table at prerouting (linux/netfilter_ipv4.h, NF_IP_PRI_NAT_DST).
const natPriority = -100

// For each family the agent moves the jump to the first place at most mostMoves times within
// moveWindow. That is enough for the programs that start with a node. A program that always
// re-inserts its rule first wins after five moves: the agent then leaves that rule where it is until
// the agent restarts.
const (
	mostMoves  = 5
	moveWindow = 10 * time.Minute
)

// aboveJump returns the first rule above the jump in the nat table's PREROUTING that can take
// requests of the service, or an empty string.
func (t *IPTables) aboveJump(s *saved, service netip.AddrPort) (string, error) {
	if s.hidden["nat"] {
		return t.ports.aboveJump(service.Addr())
	}
	jump, seen := canon(jump(service, Chain).spec), make(map[string]bool)
	for _, spec := range s.nat["PREROUTING"] {
		if canon(splitRule(spec)) == jump {
			break
		}
		if s.canTake(service, "PREROUTING", spec, seen) {
			return spec, nil
		}
	}
	return "", nil
}

// aboveJump returns a text if any rule of iptables-nft stands above the jump, other than the jumps
// of other services. It also reads a table that iptables-nft does not list.
func (k *nft) aboveJump(service netip.Addr) (string, error) {
	conn, err := k.open()
	if err != nil {
		return "", err
	}
	rules, err := conn.GetRules(&nftables.Table{Name: "nat", Family: familyOf(service).table}, &nftables.Chain{Name: "PREROUTING"})
	if err != nil {
		return "", supported(err)
	}
	for _, r := range rules {
		jumps := slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
			verdict, ok := e.(*expr.Verdict)
			return ok && verdict.Chain == Chain
		})
		if !jumps {
			return "a rule that iptables does not list", nil
		}
		if slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
			cmp, ok := e.(*expr.Cmp)
			return ok && string(cmp.Data) == string(addrBytes(service))
		}) {
			break
		}
	}
	return "", nil
}

// isJumpBelow reports whether a rule above the jump can take requests of the service.
func (t *IPTables) isJumpBelow(ctx context.Context, service netip.AddrPort) (bool, error) {
	if t.form == NFT { // which netlink shows without a process, where the jump is the very first rule
		if above, err := t.ports.aboveJump(service.Addr()); err == nil && above == "" {
			return false, nil
		}
	}
	s, err := t.save(ctx, service.Addr())
	if err != nil {
		return false, err
	}
	above, err := t.aboveJump(s, service)
	return above != "", err
}

// firstPlace names the jump's place for people.
func firstPlace(above string) string {
	return "first place of the jump to " + Chain + ", above it: " + above
}

// precedence adds to the changes a move of the jump to the first place if a rule above it can take
// requests, and returns a line for it. It reports what it leaves as it is to Node.Conflict.
func (t *IPTables) precedence(ctx context.Context, s *saved, metadata netip.AddrPort, changes *script) ([]string, error) {
	family := metadata.Addr()
	chains, err := t.earlierChains(ctx, family)
	if err != nil {
		return nil, err
	}
	for _, chain := range chains {
		t.conflict("NAT " + chain)
	}
	jump := jump(metadata, Chain)
	if there, err := t.stands(s, family, jump); err != nil || !there { // it is made at the first place
		return nil, err
	}
	above, err := t.aboveJump(s, metadata)
	if err != nil || above == "" {
		return nil, err
	}
	v6, now := family.Is6(), t.now()
	t.moved[v6] = slices.DeleteFunc(t.moved[v6], func(at time.Time) bool { return now.Sub(at) >= moveWindow })
	if len(t.moved[v6]) >= mostMoves {
		t.conceded[v6] = above
	}
	if t.conceded[v6] == above {
		t.conflict(fmt.Sprintf("rule above the jump to %s, put there again after each of %d moves, and left there until the agent restarts: %s", Chain, mostMoves, above))
		return nil, nil
	}
	changes.add("-D", jump)
	changes.add("-I", jump)
	return []string{fmt.Sprintf("missing: %s (%s)", firstPlace(above), t.form)}, nil
}

// earlierChains names the NAT chains with rules at prerouting that run before the redirections of a family, or may.
//
// A lower priority comes first, whatever hook the chain asks for: all NAT is done at one (nf_nat_register_fn). Of chains of
// the same priority the one that was registered last comes first (nf_hook_entries_grow). The kernel does not tell that order:
// its list of hooks (nfnetlink_hook) has the one hook of NAT, without the chains, and a table's age or a chain's place in a
// list is not when the chain was registered. So each chain of the same priority counts.
func (t *IPTables) earlierChains(ctx context.Context, family netip.Addr) ([]string, error) {
	chains, err := t.ports.natChains(familyOf(family), t.form)
	if errors.Is(err, ErrUnsupported) {
		err = nil // a kernel without nftables has no such chain
	}
	if err != nil || t.form == Legacy || !t.ports.used(Legacy, family.Is6(), "nat") {
		return chains, err
	}
	// iptables-legacy registers a chain of its own. Its table exists, so asking makes none.
	name := "chain PREROUTING of iptables-legacy"
	if family.Is6() {
		name = "chain PREROUTING of ip6tables-legacy"
	}
	legacy, err := t.find(Legacy, family.Is6())
	if errors.Is(err, ErrNoIPTables) {
		return append(chains, name+", which no command of the node lists"), nil
	}
	if err != nil {
		return nil, err
	}
	rules, err := run(ctx, "", legacy, "--wait", fmt.Sprint(lockSeconds), "-t", "nat", "-S", "PREROUTING")
	if strings.Contains(rules, "-A PREROUTING ") {
		chains = append(chains, name)
	}
	return chains, err
}

// natChains is earlierChains for the kernel's nftables, iptables-nft's included where the redirections are of another form.
func (k *nft) natChains(f *family, form Form) (names []string, err error) {
	for range 5 { // a change in between ends a dump early
		if names, err = k.natChainsOnce(f, form); !errors.Is(err, ErrBusy) {
			break
		}
	}
	return names, err
}

func (k *nft) natChainsOnce(f *family, form Form) ([]string, error) {
	if err := k.inKernel(); err != nil {
		return nil, err
	}
	conn, err := k.open()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, family := range []nftables.TableFamily{f.table, nftables.TableFamilyINet} {
		chains, err := conn.ListChainsOfTableFamily(family)
		if err != nil {
			return nil, supported(err)
		}
		for _, c := range chains {
			if c.Type != nftables.ChainTypeNAT || c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookPrerouting || c.Priority == nil || *c.Priority > natPriority {
				continue
			}
			ofIPTables := form == NFT && family == f.table && c.Table.Name == "nat" && c.Name == "PREROUTING"
			if ofIPTables || c.Table.Name == Table {
				continue
			}
			rules, err := conn.GetRules(c.Table, c)
			if err != nil {
				return nil, supported(err)
			}
			if len(rules) > 0 {
				names = append(names, fmt.Sprintf("chain %s of table %s %s", c.Name, familyName(family), c.Table.Name))
			}
		}
	}
	return names, nil
}
