package redirect

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Choose is the iptables that a configured backend means: "iptables-nft" and "iptables-legacy" themselves, "iptables"
// whatever the node's command of that name is, and "auto" the form that the node's own rules stand in. What "auto" found
// is remembered, so that it costs process runs once and not at each ADD; a record names the form of its rules, so a choice
// that changes loses none. The error is ErrNoIPTables where the node has no such command.
func (n *Node) Choose(backend string) (*IPTables, error) {
	switch backend {
	case "auto":
		return n.auto()
	case "iptables":
		form, err := n.plain()
		if err != nil {
			return nil, err
		}
		return n.IPTables(form)
	default:
		return n.IPTables(Form(backend))
	}
}

// Usable tells, without running anything that could be told from the files, whether Choose could succeed.
func (n *Node) Usable(backend string) error {
	switch backend {
	case "auto":
		if len(n.has()) == 0 {
			return fmt.Errorf("%w in %s", ErrNoIPTables, strings.Join(n.Dirs, ":"))
		}
		return nil
	case "iptables":
		_, err := n.plain()
		return err
	default:
		_, err := n.IPTables(Form(backend))
		return err
	}
}

func (n *Node) auto() (*IPTables, error) {
	if data, err := os.ReadFile(n.Choice); err == nil {
		// A command that is gone since is chosen anew.
		if t, err := n.IPTables(Form(strings.TrimSpace(string(data)))); err == nil {
			return t, nil
		}
	}
	form, err := n.judge()
	if err != nil {
		return nil, err
	}
	if err := n.remember(form); err != nil {
		return nil, fmt.Errorf("chosen form of iptables: %w", err)
	}
	return n.IPTables(form)
}

// judge looks where kubelet's and kube-proxy's chains stand: kubelet makes KUBE-IPTABLES-HINT and KUBE-KUBELET-CANARY in
// mangle before it starts a pod, so that programs in containers can tell the node's form (KEP 3178). Where neither form has
// them, the node's administrator has decided by what "iptables" is.
func (n *Node) judge() (Form, error) {
	forms := n.has()
	switch len(forms) {
	case 0:
		return "", fmt.Errorf("%w in %s", ErrNoIPTables, strings.Join(n.Dirs, ":"))
	case 1:
		return forms[0], nil
	}
	for _, form := range forms {
		if n.kubernetesIn(form) {
			return form, nil
		}
	}
	if form, err := n.plain(); err == nil {
		return form, nil
	}
	return forms[0], nil
}

func (n *Node) has() []Form {
	var forms []Form
	for _, form := range []Form{NFT, Legacy} {
		if _, err := n.find(form, false); err == nil {
			forms = append(forms, form)
		}
	}
	return forms
}

// kubernetesIn is false too where the form does not work: it holds nobody's chains then.
func (n *Node) kubernetesIn(form Form) bool {
	if !used(form, false, "mangle") {
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
	tmp, err := os.CreateTemp(dir, ".choice-*")
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
