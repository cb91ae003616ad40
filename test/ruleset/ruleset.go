// Package ruleset lists the rules of a network namespace in a form that tests can compare: without
// counters and comments, with the elements of sets sorted.
package ruleset

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// families are the nftables families in which kube2iam-cni has tables.
var families = []string{"bridge", "ip", "ip6"}

// Own returns kube2iam-cni's nftables tables in the network namespace of the calling thread: their
// rules in order, then the elements of their sets and maps, sorted.
func Own() ([]string, error) {
	all, err := run("nft", "list", "ruleset")
	return own(all), err
}

// All returns Own and the rules of iptables in the network namespace of the calling thread.
func All() ([]string, error) {
	nft, err := run("nft", "list", "ruleset")
	if err != nil {
		return nil, err
	}
	var all []string
	for _, f := range []struct{ command, family, legacyTables string }{
		{"iptables", "ip", "/proc/thread-self/net/ip_tables_names"},
		{"ip6tables", "ip6", "/proc/thread-self/net/ip6_tables_names"},
	} {
		var saves []string
		if regexp.MustCompile(`(?m)^table ` + f.family + ` (filter|mangle|nat|raw|security) \{`).MatchString(nft) {
			saves = append(saves, f.command+"-nft-save")
		}
		tables, err := os.ReadFile(f.legacyTables)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if len(tables) > 0 {
			saves = append(saves, f.command+"-legacy-save")
		}
		for _, save := range saves {
			rules, err := run(save)
			if err != nil {
				return nil, err
			}
			for line := range strings.Lines(rules) {
				if !strings.HasPrefix(line, "#") {
					all = append(all, save+": "+strings.TrimSpace(counters.ReplaceAllString(line, "")))
				}
			}
		}
	}
	return append(all, own(nft)...), nil
}

var counters = regexp.MustCompile(`\[\d+:\d+\]`)

func run(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("%s: %w: %s", name, err, exit.Stderr)
	}
	return string(out), err
}

func own(ruleset string) (all []string) {
	for _, family := range families {
		header := "table " + family + " kube2iam-cni {\n"
		if _, table, ok := strings.Cut("\n"+ruleset, "\n"+header); ok {
			body, _, _ := strings.Cut(table, "\n}")
			all = append(all, lines(family, header+body+"\n}")...)
		}
	}
	return all
}

var (
	set      = regexp.MustCompile(`(?s)(?:set|map) (\w+) \{.*?\n\t\}`)
	elements = regexp.MustCompile(`(?s)elements = \{(.*?)\}`)
)

// lines returns the rules of a table in their order, followed by the elements of its sets and maps,
// sorted, as "family set: element". The kernel lists elements in no fixed order.
func lines(family, table string) []string {
	var held []string
	for _, s := range set.FindAllStringSubmatch(table, -1) {
		if list := elements.FindStringSubmatch(s[0]); list != nil {
			for _, e := range strings.Split(list[1], ",") {
				held = append(held, fmt.Sprintf("nft %s %s: %s", family, s[1], strings.TrimSpace(e)))
			}
		}
	}
	slices.Sort(held)
	return append(strings.Split(set.ReplaceAllString(table, "set $1"), "\n"), held...)
}
