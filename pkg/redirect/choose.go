package redirect

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Choose is what a configured backend means: "nftables", "iptables-nft" and "iptables-legacy" themselves, "iptables" the
// form of the node's command of that name, and "auto" the form that the node's own rules stand in, or nftables on a node
// without an iptables that works. What "auto" found is remembered, so that it costs process runs once and not at each ADD;
// a record names the form of its rules, so a choice that changes loses none. The error is ErrNoIPTables where the node has no
// such command.
func (n *Node) Choose(backend string) (Backend, error) {
	switch backend {
	case "auto":
		return n.auto()
	case "iptables":
		form, err := n.plain()
		if err != nil {
			return nil, err
		}
		return n.Backend(form)
	default:
		return n.Backend(Form(backend))
	}
}

// Usable tells, without running anything that could be told from the files, whether Choose could succeed.
func (n *Node) Usable(backend string) error {
	switch backend {
	case "auto":
		return nil // there is always nftables; what the kernel lacks of it, ADD says
	case "iptables":
		_, err := n.plain()
		return err
	default:
		_, err := n.Backend(Form(backend))
		return err
	}
}

func (n *Node) auto() (Backend, error) {
	if data, err := os.ReadFile(n.Choice); err == nil {
		// A command that is gone since, or one whose kernel lacks nf_tables, is chosen anew.
		form := Form(strings.TrimSpace(string(data)))
		if t, err := n.Backend(form); err == nil && (form == Legacy || n.bridges().inKernel() == nil) {
			return t, nil
		}
	}
	form := n.judge()
	if err := n.remember(form); err != nil {
		return nil, fmt.Errorf("chosen backend: %w", err)
	}
	return n.Backend(form)
}

// judge looks where kubelet's and kube-proxy's chains stand: kubelet makes KUBE-IPTABLES-HINT and KUBE-KUBELET-CANARY in
// mangle before it starts a pod, so that programs in containers can tell the node's form (KEP 3178). Where neither form has
// them, the node's administrator has decided by what "iptables" is. A command whose kernel has no such tables is none.
func (n *Node) judge() Form {
	usable := n.usable()
	if len(usable) == 0 {
		return NFTables
	}
	if len(usable) == 1 {
		return usable[0]
	}
	for _, form := range usable {
		if n.kubernetesIn(form) {
			return form
		}
	}
	if form, err := n.plain(); err == nil && slices.Contains(usable, form) {
		return form
	}
	return usable[0]
}

// usable are the forms whose command finds its tables in the kernel. Asking the legacy one makes a table, which each packet
// would pass from then on: so where the other form works, it counts only if its tables are there already, or if it is what
// the node's "iptables" is.
func (n *Node) usable() []Form {
	var usable []Form
	if path, err := n.find(NFT, false); err == nil && n.bridges().inKernel() == nil && works(path+"-save") {
		usable = append(usable, NFT)
	}
	if path, err := n.find(Legacy, false); err == nil {
		there := n.bridges().used(Legacy, false, "mangle") || n.bridges().used(Legacy, false, "nat")
		if !there && len(usable) > 0 {
			form, err := n.plain()
			there = err == nil && form == Legacy
		}
		if there || len(usable) == 0 && works(path, "-t", "nat", "-S", "PREROUTING") {
			usable = append(usable, Legacy)
		}
	}
	return usable
}

func works(path string, args ...string) bool {
	_, err := run(context.Background(), "", path, args...)
	return err == nil
}

// kubernetesIn is false too where the form does not work: it holds nobody's chains then.
func (n *Node) kubernetesIn(form Form) bool {
	if !n.bridges().used(form, false, "mangle") {
		return false
	}
	t, err := n.IPTables(form)
	if err != nil {
		return false
	}
	ipt, err := t.at(anyIPv4)
	if err != nil {
		return false
	}
	chains, err := ipt.ListChains("mangle")
	if err != nil {
		return false
	}
	for _, chain := range chains {
		if strings.HasPrefix(chain, "KUBE-") {
			return true
		}
	}
	return false
}

// plain is the form of the command that is named iptables.
func (n *Node) plain() (Form, error) {
	path := n.look("iptables")
	if path == "" {
		return "", fmt.Errorf("%w: iptables in none of %s", ErrNoIPTables, strings.Join(n.Dirs, ":"))
	}
	return formOf(path)
}

// formOf tells the form of a command by the program that it is a link to, and only where that does not say it by a run:
// "iptables v1.8.9 (nf_tables)". Before 1.8 there was the legacy form alone.
func formOf(path string) (Form, error) {
	if program, err := filepath.EvalSymlinks(path); err == nil {
		switch name := filepath.Base(program); {
		case strings.Contains(name, "nft"):
			return NFT, nil
		case strings.Contains(name, "legacy"), name == "xtables-multi":
			return Legacy, nil
		}
	}
	version, err := exec.Command(path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%w: version of %s: %w", ErrNoIPTables, path, err)
	}
	if strings.Contains(string(version), "nf_tables") {
		return NFT, nil
	}
	return Legacy, nil
}

func (n *Node) remember(form Form) error {
	dir := filepath.Dir(n.Choice)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	sweep(dir)
	tmp, err := os.CreateTemp(dir, unready+"*")
	if err != nil {
		return err
	}
	_, err = tmp.WriteString(string(form) + "\n")
	if closed := tmp.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(tmp.Name(), n.Choice)
	}
	if err != nil {
		os.Remove(tmp.Name())
	}
	return err
}

// unready begins the names of choices that are being written.
const unready = ".choice-"

// sweep removes what processes left that were killed over such a one, a while ago.
func sweep(dir string) {
	files, _ := filepath.Glob(filepath.Join(dir, unready+"*"))
	for _, file := range files {
		if info, err := os.Stat(file); err == nil && time.Since(info.ModTime()) > time.Minute {
			os.Remove(file)
		}
	}
}
