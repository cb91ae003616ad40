package redirect

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"
)

// ErrNoIPTables is the error of a node that has no iptables command, or none of the form that is asked for.
var ErrNoIPTables = errors.New("no iptables command")

// Node is the iptables commands of a node, in whichever forms it has them.
type Node struct {
	// Dirs are where commands are looked for, in order.
	Dirs []string
	// Lock serialises the making of the base.
	Lock func(context.Context) (unlock func(), err error)
	// Unbound is told of a bridged attachment whose answers no kernel's table binds to its port: a neighbour may draw them.
	// It may be nil.
	Unbound func(id string, err error)
	// Unguarded is told of a service of Base.Guarded that this kernel has no guard for. It may be nil.
	Unguarded func(service netip.AddrPort, err error)
	// Conflict is told in each Repair of what other programs have before the redirections of iptables, and that is not changed:
	// NAT chains, and a rule that was put above the jump again and again. It may be nil.
	Conflict func(what string)

	forms   map[Form]*IPTables
	ports   *ports
	netlink []nftables.ConnOption // for tests
	now     func() time.Time      // for tests, or nil
}

// allForms are all of them, in the order in which teardown looks for rules whose form it does not know.
var allForms = []Form{NFT, Legacy, NFTables}

// Backend is what programs rules in a form; the error is ErrNoIPTables where the node lacks its command.
func (n *Node) Backend(form Form) (Backend, error) {
	if form == NFTables {
		return n.nftables(), nil
	}
	t, err := n.IPTables(form)
	if err != nil {
		return nil, err
	}
	return t, nil
}

func (n *Node) nftables() *NFTablesBackend { return &NFTablesBackend{n.bridges(), n.unguarded} }

func (n *Node) bridges() *ports {
	if n.ports == nil {
		n.ports = &ports{&nft{lock: n.Lock, options: n.netlink}}
	}
	return n.ports
}

// unguarded tells of services that no guard could be made for.
func (n *Node) unguarded(services []netip.AddrPort, err error) error {
	for _, service := range services {
		if n.Unguarded != nil {
			n.Unguarded(service, err)
		}
	}
	return nil
}

// Close lets go of what the node's backends have open. They may be used again.
func (n *Node) Close() {
	if n.ports != nil {
		n.ports.close()
	}
}

// Dirs are the directories of PATH, and those where distributions put iptables: a runtime's PATH does not always have them.
func Dirs() []string {
	var dirs []string
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin") {
		if filepath.IsAbs(dir) && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// IPTables is the node's iptables in one form; the error is ErrNoIPTables where it has none.
func (n *Node) IPTables(form Form) (*IPTables, error) {
	if t := n.forms[form]; t != nil {
		return t, nil
	}
	if _, err := n.find(form, false); err != nil {
		return nil, err
	}
	if n.forms == nil {
		n.forms = make(map[Form]*IPTables)
	}
	t := &IPTables{form: form, find: n.find, lock: n.Lock, ports: n.bridges(), unbound: n.Unbound, unguarded: n.unguarded,
		conflict: n.Conflict, now: n.now, moved: make(map[bool][]time.Time), conceded: make(map[bool]string), opened: make(map[bool]*iptables.IPTables)}
	if t.conflict == nil {
		t.conflict = func(string) {}
	}
	if t.now == nil {
		t.now = time.Now
	}
	n.forms[form] = t
	return t, nil
}

// find is the path of the command: the one that is named for its form, or else the plain one if it is of that form. It
// comes with its -restore and its -save, which the same package has under the same name.
func (n *Node) find(form Form, v6 bool) (string, error) {
	if form != NFT && form != Legacy {
		return "", fmt.Errorf("%w of the form %q", ErrNoIPTables, form)
	}
	named, plain := string(form), "iptables"
	if v6 {
		named, plain = strings.Replace(named, "iptables", "ip6tables", 1), "ip6tables"
	}
	if path := n.look(named); path != "" {
		return path, nil
	}
	if path := n.look(plain); path != "" {
		if is, err := formOf(path); err == nil && is == form {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: %s with its -restore and -save in none of %s", ErrNoIPTables, named, strings.Join(n.Dirs, ":"))
}

func (n *Node) look(name string) string {
	for _, dir := range n.Dirs {
		path := filepath.Join(dir, name)
		if executable(path) && executable(path+"-restore") && executable(path+"-save") {
			return path
		}
	}
	return ""
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// used reports whether rules can be in a table in the given form. In the nft form there are none
// without nf_tables. The legacy command would make the table when it is asked, and each packet would
// pass the table from then on, so the kernel's list of such tables is read instead. The list is that
// of the calling thread's network namespace.
func (k *nft) used(form Form, v6 bool, table string) bool {
	switch form {
	case NFTables:
		return true
	case NFT:
		return k.inKernel() == nil
	}
	list := "/proc/thread-self/net/ip_tables_names"
	if v6 {
		list = "/proc/thread-self/net/ip6_tables_names"
	}
	f, err := os.Open(list)
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	if err != nil {
		return true
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if lines.Text() == table {
			return true
		}
	}
	return false
}
