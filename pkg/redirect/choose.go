package redirect

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// Choose returns the backend that a configuration names. "iptables" is the form of the node's
// command of that name, and "auto" is nftables if the kernel has it, else iptables-legacy. The
// error is ErrNoIPTables if the node lacks the command.
//
// A record names the form of its rules, so a choice that differs from an earlier one loses no rule.
func (n *Node) Choose(backend string) (Backend, error) {
	form := Form(backend)
	switch backend {
	case "auto":
		return n.auto()
	case "iptables":
		var err error
		if form, err = n.plain(); err != nil {
			return nil, err
		}
	}
	return n.Backend(form)
}

func (n *Node) auto() (Backend, error) {
	unsupported := n.bridges().inKernel()
	if unsupported == nil {
		return n.nftables(), nil
	}
	legacy, err := n.Backend(Legacy)
	if err != nil {
		return nil, fmt.Errorf("%w; %w", unsupported, err)
	}
	return legacy, nil
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
