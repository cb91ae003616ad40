// Package nftlist makes the output of "nft list table" comparable: the kernel lists the elements of
// a set in no fixed order.
package nftlist

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Families are the address families in which kube2iam-cni has tables.
var Families = []string{"bridge", "ip", "ip6"}

var (
	set      = regexp.MustCompile(`(?s)(?:set|map) (\w+) \{.*?\n\t\}`)
	elements = regexp.MustCompile(`(?s)elements = \{(.*?)\}`)
)

// Lines returns the rules of a listing in their order, followed by the elements of its sets and
// maps, sorted, as "family set: element".
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

// Ours returns the lines of all tables of kube2iam-cni. list runs nft with arguments. A table that
// does not exist is no error.
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
