package redirect

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// canTake reports whether a rule of a chain of the nat table could end a request's way through the
// table, so that no later rule sees it. It follows jumps. A match that it does not know counts as
// one that matches, and an unknown target as one that ends it.
//
// It serves to ignore the rules of other programs that are always there and concern other
// destinations: Felix keeps a jump to cali-PREROUTING above all others, which leads to the DNATs of
// floating IPs and nowhere else.
func (s *saved) canTake(service netip.AddrPort, chain, spec string, seen map[string]bool) bool {
	target, isGoto, matches := parseRule(spec, service)
	switch {
	case !matches, slices.Contains(passOn, target):
		return false
	case target == "RETURN":
		return chain == "PREROUTING" // which ends there
	case isGoto:
		return true
	}
	rules, isChain := s.nat[target]
	if !isChain || seen[target] {
		return !isChain
	}
	seen[target] = true
	return slices.ContainsFunc(rules, func(spec string) bool { return s.canTake(service, target, spec, seen) })
}

// passOn are the targets that leave a request to the next rule, and our own chain: it has the
// redirections.
var passOn = []string{"", "CONNMARK", "LOG", "MARK", "NFLOG", "TRACE", Chain}

// parseRule returns the target of a rule as iptables-save writes it, and false for one that cannot
// match a TCP packet to service.
func parseRule(spec string, service netip.AddrPort) (target string, isGoto, matches bool) {
	matches = true
	words := splitRule(spec)
	for i := 0; i+1 < len(words); i++ {
		value, is := words[i+1], !(i > 0 && words[i-1] == "!")
		switch words[i] {
		case "--comment":
			i++
		case "-j", "-g":
			target, isGoto = value, words[i] == "-g"
		case "-p":
			matches = matches && (value == "tcp") == is
		case "-d":
			if prefix, err := netip.ParsePrefix(value); err == nil {
				matches = matches && prefix.Contains(service.Addr()) == is
			}
		case "--dport", "--dports":
			if has, err := portsContain(value, service.Port()); err == nil {
				matches = matches && has == is
			}
		}
	}
	return target, isGoto, matches
}

// portsContain reports whether a list such as "80,8000:8080" contains a port.
func portsContain(list string, port uint16) (bool, error) {
	has := false
	for one := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(one, ":")
		if !isRange {
			to = from
		}
		first, err := strconv.ParseUint(from, 10, 16)
		if err != nil {
			return false, err
		}
		last, err := strconv.ParseUint(to, 10, 16)
		if err != nil {
			return false, err
		}
		has = has || uint64(port) >= first && uint64(port) <= last
	}
	return has, nil
}

// splitRule splits a rule into words as iptables-save quotes them (libxtables,
// xtables_save_string).
func splitRule(spec string) []string {
	var words []string
	var word []byte
	quoted := false
	for i := 0; i < len(spec); i++ {
		switch c := spec[i]; {
		case c == '\\' && quoted && i+1 < len(spec):
			i++
			word = append(word, spec[i])
		case c == '"':
			quoted = !quoted
		case c == ' ' && !quoted:
			words, word = append(words, string(word)), word[:0]
		default:
			word = append(word, c)
		}
	}
	return append(words, string(word))
}
