// Package ipfamily names the two IP families.
package ipfamily

import (
	"fmt"
	"net/netip"
	"os"
)

// Family is an IP family. Its value is the IP version.
type Family int

// The IP families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Of returns the family of ip.
func Of(ip netip.Addr) Family {
	if ip.Is6() {
		return IPv6
	}
	return IPv4
}

// String returns "IPv4" or "IPv6".
func (f Family) String() string { return fmt.Sprintf("IPv%d", int(f)) }

// HasIPv6 reports whether the kernel has IPv6.
func HasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}
