package redirect

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestChoose(t *testing.T) {
	for name, tc := range map[string]struct {
		commands []string
		build    func(*namespace)
		backend  string
		want     Form
		runs     int // of commands, to find it out
	}{
		"auto": {
			commands: both, backend: "auto", want: NFTables, runs: 0,
		},
		"auto, whatever the node's own rules are in": {
			commands: both, backend: "auto", want: NFTables, runs: 0,
			build: func(n *namespace) {
				n.program("iptables", "xtables-legacy-multi")
				n.run("iptables-legacy -t mangle -N KUBE-IPTABLES-HINT")
				n.run("iptables-nft -t mangle -N KUBE-KUBELET-CANARY")
			},
		},
		"auto, no iptables": {
			backend: "auto", want: NFTables, runs: 0,
		},
		"auto, a kernel without nftables": {
			commands: both, backend: "auto", want: Legacy, runs: 0,
			build: func(n *namespace) { n.withoutNFTables() },
		},
		"auto, a kernel without nftables, and iptables is older than the forms": {
			backend: "auto", want: Legacy, runs: 0,
			build: func(n *namespace) {
				n.program("iptables", "xtables-multi")
				n.withoutNFTables()
			},
		},
		"nftables": {
			commands: both, backend: "nftables", want: NFTables, runs: 0,
		},
		"iptables is the nft form, by its version": {
			commands: both, backend: "iptables", want: NFT, runs: 1,
			build: func(n *namespace) { n.says("iptables", "iptables v1.8.9 (nf_tables)") },
		},
		"iptables is the legacy form, by its version": {
			commands: both, backend: "iptables", want: Legacy, runs: 1,
			build: func(n *namespace) { n.says("iptables", "iptables v1.8.9 (legacy)") },
		},
		"iptables is older than the forms": {
			commands: nil, backend: "iptables", want: Legacy, runs: 2,
			build: func(n *namespace) { n.says("iptables", "iptables v1.6.1") },
		},
		"iptables is older than the forms, by its program": {
			commands: nil, backend: "iptables", want: Legacy, runs: 0,
			build: func(n *namespace) { n.program("iptables", "xtables-multi") },
		},
		"iptables-legacy, whatever kubelet is in": {
			commands: both, backend: "iptables-legacy", want: Legacy, runs: 0,
			build: func(n *namespace) { n.run("iptables-nft -t mangle -N KUBE-IPTABLES-HINT") },
		},
		"iptables-nft, under the plain name": {
			commands: nil, backend: "iptables-nft", want: NFT, runs: 0,
			build: func(n *namespace) { n.program("iptables", "xtables-nft-multi") },
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNamespace(t, tc.commands...)
			if tc.build != nil {
				tc.build(n)
			}
			tables := n.legacyTables()
			n.calls()
			got, err := n.Choose(tc.backend)
			n.must(err)
			if got.Form() != tc.want {
				t.Errorf("got %s, want %s", got.Form(), tc.want)
			}
			if calls := n.calls(); len(calls) != tc.runs {
				t.Errorf("ran %d commands, want %d:\n%s", len(calls), tc.runs, strings.Join(calls, "\n"))
			}
			if diff := cmp.Diff(tables, n.legacyTables()); diff != "" {
				t.Errorf("the question made legacy tables:\n%s", diff)
			}
		})
	}
}

// program makes a command a link to a program of a given name.
func (n *namespace) program(command, name string) {
	n.Helper()
	n.must(os.WriteFile(filepath.Join(n.dir, name), []byte(stand), 0o755))
	for _, with := range []string{"", "-restore", "-save"} {
		n.must(os.Symlink(name, filepath.Join(n.dir, command+with)))
	}
}

// says makes a command that only tells its version.
func (n *namespace) says(command, version string) {
	n.Helper()
	for _, with := range []string{"", "-restore", "-save"} {
		n.must(os.WriteFile(filepath.Join(n.dir, command+with), []byte("#!/bin/sh\necho $0 >>\"${0%/*}/log\"\necho '"+version+"'\n"), 0o755))
	}
}

func (n *namespace) legacyTables() string {
	n.Helper()
	data, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if !errors.Is(err, os.ErrNotExist) {
		n.must(err)
	}
	return string(data)
}

// TestChooseAutoOfNothing is a kernel without nftables on a node whose only iptables needs it.
func TestChooseAutoOfNothing(t *testing.T) {
	n := newNamespace(t, "iptables-nft")
	n.withoutNFTables()
	if _, err := n.Choose("auto"); !errors.Is(err, ErrUnsupported) || !errors.Is(err, ErrNoIPTables) {
		t.Errorf("got %v, want %v and %v", err, ErrUnsupported, ErrNoIPTables)
	}
}

func TestDirs(t *testing.T) {
	t.Setenv("PATH", "/opt/bin:relative:/sbin::/opt/bin")
	want := []string{"/opt/bin", "/sbin", "/usr/sbin", "/usr/local/sbin", "/usr/bin", "/bin"}
	if diff := cmp.Diff(want, Dirs()); diff != "" {
		t.Error(diff)
	}
}
