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
		makes    string
	}{
		"auto, the nft form only": {
			commands: []string{"iptables-nft"}, backend: "auto", want: NFT, runs: 1,
		},
		"auto, the legacy form only": {
			commands: []string{"iptables-legacy"}, backend: "auto", want: Legacy, runs: 1, makes: "nat\n",
		},
		"auto, kubelet is in the nft form": {
			commands: both, backend: "auto", want: NFT, runs: 3,
			build: func(n *namespace) {
				n.run("iptables-legacy -t mangle -N SOMEBODY")
				n.run("iptables-nft -t mangle -N KUBE-IPTABLES-HINT")
			},
		},
		"auto, kubelet is in the legacy form": {
			commands: both, backend: "auto", want: Legacy, runs: 5,
			build: func(n *namespace) {
				n.run("iptables-nft -t mangle -N SOMEBODY")
				n.run("iptables-legacy -t mangle -N KUBE-KUBELET-CANARY")
			},
		},
		"auto, no kubelet, and iptables is the nft form": {
			commands: both, backend: "auto", want: NFT, runs: 1,
			build: func(n *namespace) { n.program("iptables", "xtables-nft-multi") },
		},
		"auto, no kubelet, and iptables is the legacy form": {
			commands: both, backend: "auto", want: Legacy, runs: 3,
			build: func(n *namespace) { n.program("iptables", "xtables-legacy-multi") },
		},
		"auto, no kubelet, no command iptables": {
			commands: both, backend: "auto", want: NFT, runs: 1,
		},
		"auto, no iptables": {
			backend: "auto", want: NFTables, runs: 0,
		},
		"auto, an iptables that does not work": {
			backend: "auto", want: NFTables, runs: 2,
			build: func(n *namespace) {
				n.fails("iptables-nft")
				n.fails("iptables-legacy")
			},
		},
		"auto, an iptables without its -restore": {
			commands: both, backend: "auto", want: NFTables, runs: 0,
			build: func(n *namespace) {
				n.must(os.Remove(filepath.Join(n.dir, "iptables-nft-restore")))
				n.must(os.Remove(filepath.Join(n.dir, "iptables-legacy-restore")))
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
			commands: nil, backend: "auto", want: Legacy, runs: 1,
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
			n.must(n.Usable(tc.backend))
			n.calls()
			got, err := n.Choose(tc.backend)
			n.must(err)
			if got.Form() != tc.want {
				t.Errorf("got %s, want %s", got.Form(), tc.want)
			}
			if calls := n.calls(); len(calls) != tc.runs {
				t.Errorf("ran %d commands, want %d:\n%s", len(calls), tc.runs, strings.Join(calls, "\n"))
			}
			if diff := cmp.Diff(tables+tc.makes, n.legacyTables()); diff != "" {
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

// fails makes a command that does not work.
func (n *namespace) fails(command string) {
	n.Helper()
	for _, with := range []string{"", "-restore", "-save"} {
		n.must(os.WriteFile(filepath.Join(n.dir, command+with), []byte("#!/bin/sh\necho $0 >>\"${0%/*}/log\"\nexit 3\n"), 0o755))
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

func TestChoiceIsRemembered(t *testing.T) {
	n := newNamespace(t, both...)
	choose := func(want Form) {
		t.Helper()
		n.forget()
		got, err := n.Choose("auto")
		n.must(err)
		if got.Form() != want {
			t.Errorf("got %s, want %s", got.Form(), want)
		}
	}
	n.run("iptables-legacy -t mangle -N KUBE-IPTABLES-HINT")
	choose(Legacy)
	n.run("iptables-legacy -t mangle -X")
	n.run("iptables-nft -t mangle -N KUBE-IPTABLES-HINT")
	n.calls()
	choose(Legacy)
	if calls := n.calls(); calls != nil {
		t.Errorf("a choice that was made ran\n%s", strings.Join(calls, "\n"))
	}

	n.must(os.WriteFile(n.Choice, []byte("\x00garbage"), 0o644))
	choose(NFT)
	n.must(os.WriteFile(n.Choice, []byte(Legacy), 0o644))
	choose(Legacy)
	n.must(os.Remove(filepath.Join(n.dir, "iptables-legacy")))
	choose(NFT)
	n.command("iptables-legacy")
	choose(NFT)
	entries, err := os.ReadDir(filepath.Dir(n.Choice))
	n.must(err)
	if len(entries) != 1 {
		t.Errorf("the state directory holds %v", entries)
	}
}

func TestChoiceCannotBeRemembered(t *testing.T) {
	n := newNamespace(t, "iptables-nft")
	n.Choice = filepath.Join(n.dir, "iptables-nft", "choice")
	if _, err := n.Choose("auto"); err == nil || errors.Is(err, ErrNoIPTables) {
		t.Errorf("got %v, want the error of the file", err)
	}
}

func TestDirs(t *testing.T) {
	t.Setenv("PATH", "/opt/bin:relative:/sbin::/opt/bin")
	want := []string{"/opt/bin", "/sbin", "/usr/sbin", "/usr/local/sbin", "/usr/bin", "/bin"}
	if diff := cmp.Diff(want, Dirs()); diff != "" {
		t.Error(diff)
	}
}
