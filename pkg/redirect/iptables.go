package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/coreos/go-iptables/iptables"
)

// Form is one of the two ways in which an iptables command talks to the kernel. What one programs, the other neither sees
// nor removes.
type Form string

const (
	NFT    Form = "iptables-nft"
	Legacy Form = "iptables-legacy"
)

// ErrBusy is the error of a command that could not have the xtables lock, or another of the kernel's resources, in time:
// trying again later may help.
var ErrBusy = errors.New("iptables is busy")

// lockSeconds bounds the wait for the xtables lock; go-iptables waits without limit unless told.
const lockSeconds = 5

// resourceProblem is iptables' exit status where it could not have the lock (xtables.h, RESOURCE_PROBLEM).
const resourceProblem = 4

// IPTables programs rules by the node's iptables and ip6tables in one form. It is not for concurrent use.
type IPTables struct {
	form Form
	find func(name Form, v6 bool) (path string, err error)
	lock func(context.Context) (unlock func(), err error)

	opened map[bool]*iptables.IPTables // by whether it is for IPv6
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

// Open tells whether Add could begin: the attachment can be matched, and there is a command for each family of the base. It
// asks each for its version, which Add and Remove need not do again, and changes nothing.
func (t *IPTables) Open(base Base, a Attachment) error {
	if err := a.validate(); err != nil {
		return err
	}
	for _, metadata := range base.Metadata {
		if _, err := t.at(metadata.Addr()); err != nil {
			return err
		}
	}
	return nil
}

// Has tells whether there is a command for the family of ip; the error is ErrNoIPTables where there is none. To ask is a
// process run, which Open and Add need not do again.
func (t *IPTables) Has(ip netip.Addr) error {
	_, err := t.at(ip)
	return err
}

// Add appends the attachment's rules, and makes the base first where the backstop or the jump is missing. In the steady
// state a family costs four process runs: the version, a check of each, one append; and two where the attachment has no
// address of it, and only the guard is wanted. The quick refusal is not checked, because without it the backstop still
// refuses; it comes back whenever the base is made. Where there is an error, some of the rules may stand.
func (t *IPTables) Add(ctx context.Context, base Base, a Attachment) error {
	if err := t.Open(base, a); err != nil {
		return err
	}
	for _, metadata := range base.Metadata {
		ipt, err := t.at(metadata.Addr())
		if err != nil {
			return err
		}
		redirections := a.rules(metadata)
		whole, err := stands(ipt, metadata, base.Guard, len(redirections) > 0)
		if err != nil {
			return err
		}
		if !whole {
			if err := t.makeBase(ctx, ipt, metadata, base.Guard, len(redirections) > 0); err != nil {
				return err
			}
		}
		for _, r := range redirections {
			if err := appendRule(ipt, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// stands tells whether the base is there, as far as Add relies on it.
func stands(ipt *iptables.IPTables, metadata netip.AddrPort, guard, redirected bool) (bool, error) {
	if guard {
		if there, err := exists(ipt, backstop(metadata)); err != nil || !there {
			return false, err
		}
	}
	if redirected {
		return exists(ipt, jump(metadata, Chain))
	}
	return true, nil
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

// makeChain makes the chain with its jump under another name. A jump follows its chain when that is renamed.
func makeChain(ipt *iptables.IPTables, metadata netip.AddrPort) error {
	const unready = Chain + "-NEW"
	there, err := chainExists(ipt, unready)
	if err != nil {
		return err
	}
	if !there {
		if err := ipt.NewChain("nat", unready); err != nil {
			return classify("chain "+unready, err)
		}
	}
	if err := insertMissing(ipt, jump(metadata, unready)); err != nil {
		return err
	}
	return classify("chain "+Chain, ipt.RenameChain("nat", unready, Chain))
}

func chainExists(ipt *iptables.IPTables, name string) (bool, error) {
	there, err := ipt.ChainExists("nat", name)
	return there, classify("chain "+name, err)
}

// remove deletes the attachment's rules, and returns the redirections that it found none of. What it could not delete is in
// the error; it goes on with the rest.
func (t *IPTables) remove(a Attachment) (absent []Redirection, err error) {
	if err := a.validate(); err != nil {
		return nil, err
	}
	var errs []error
	for _, r := range a.Redirections {
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

// Missing names what is wanted and not there. It changes nothing.
func (t *IPTables) Missing(base Base, a Attachment) ([]string, error) {
	var missing []string
	for _, metadata := range base.Metadata {
		var wanted []rule
		if base.Guard {
			wanted = append(wanted, refusal(metadata), backstop(metadata))
		}
		if redirections := a.rules(metadata); len(redirections) > 0 {
			wanted = append(wanted, jump(metadata, Chain))
			wanted = append(wanted, redirections...)
		}
		ipt, err := t.at(metadata.Addr())
		if err != nil {
			return nil, err
		}
		for _, r := range wanted {
			there, err := exists(ipt, r)
			if err != nil {
				return nil, err
			}
			if !there {
				missing = append(missing, r.what)
			}
		}
	}
	return missing, nil
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

func appendRule(ipt *iptables.IPTables, r rule) error {
	return classify(r.what, ipt.Append(r.table, r.chain, r.spec...))
}

func insertMissing(ipt *iptables.IPTables, r rule) error {
	there, err := exists(ipt, r)
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
