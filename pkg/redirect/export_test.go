package redirect

import (
	"fmt"
	"net/netip"
)

// Script returns the input of iptables-restore that adds an attachment's redirections of one family.
func Script(a Attachment, v6 bool) (string, error) {
	if err := a.validate(); err != nil {
		return "", err
	}
	s := new(script)
	for _, r := range a.Redirections {
		if r.Source.Is6() == v6 {
			s.add("-A", a.rule(r))
		}
	}
	return s.String(), s.err
}

// Elements returns the elements that nftables has of an attachment, as "family set key value comment".
func Elements(a Attachment) ([]string, error) {
	var all []element
	if a.Netns != "" {
		if err := a.validateID(); err != nil {
			return nil, err
		}
		all = new(inPod).elements(Base{}, a)
	} else {
		if err := a.validate(); err != nil {
			return nil, err
		}
		all = (&NFTablesBackend{ports: new(ports)}).elements(a)
	}
	var lines []string
	for _, e := range all {
		lines = append(lines, fmt.Sprintf("%s %s %x %x %s", familyName(e.set.Table.Family), e.set.Name, e.Key, e.Val, e.Comment))
	}
	return lines, nil
}

// Element returns the line of Elements for one of a link and an address, or of an address alone.
func Element(family, set, link string, ip netip.Addr, proxy netip.AddrPort, id string) string {
	var key, value []byte
	if link != "" {
		key = make([]byte, 16)
		copy(key, link)
	}
	key = append(key, ip.AsSlice()...)
	if proxy.IsValid() {
		value = append(proxy.Addr().AsSlice(), byte(proxy.Port()>>8), byte(proxy.Port()), 0, 0)
	}
	return fmt.Sprintf("%s %s %x %x %s", family, set, key, value, id)
}
