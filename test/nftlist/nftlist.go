// Package nftlist reads what `nft list table` writes into lines that can be compared: sets are hashes, and list their elements
// in no order that lasts.
package nftlist

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Families are those that kube2iam-cni has tables in.
var Families = []string{"bridge", "ip", "ip6"}

var (
	set      = regexp.MustCompile(`(?s)(?:set|map) (\w+) \{.*?\n\t\}`)
	elements = regexp.MustCompile(`(?s)elements = \{(.*?)\}`)
)

// Lines are the rules of a listing as they stand, and behind them the elements of its sets and maps, "family set: element",
// in order.
func Lines(family, listing string) []string {
	var held []string
	for _, s := range set.FindAllStringSubmatch(listing, -1) {
		if list := elements.FindStringSubmatch(s[0]); list != nil {
			for _, e := range strings.Split(list[1], ",") {
				held = append(held, fmt.Sprintf("nft %s %s: %s", family, s[1], strings.TrimSpace(e)))
			}
		}
	}
	slices.Sort(held)
	return append(strings.Split(strings.TrimSpace(set.ReplaceAllString(listing, "set $1")), "\n"), held...)
}

// Ours are the lines of all our tables. list runs nft with arguments; a table that is not there is no error.
func Ours(list func(args ...string) (string, error)) ([]string, error) {
	var all []string
	for _, family := range Families {
		out, err := list("list", "table", family, "kube2iam-cni")
		if err != nil {
			if strings.Contains(out+err.Error(), "No such file or directory") {
				continue
			}
			return nil, err
		}
		all = append(all, Lines(family, out)...)
	}
	return all, nil
}
