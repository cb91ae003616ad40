package hostlink

import (
	"os"
	"strings"
)

// Forwards tells whether the calling thread's namespace forwards the family. What the switch of all interfaces says is what
// counts: where it is 0 the kernel drops what it should forward, whatever each one's own is (net/ipv4/ip_forward sets all;
// net/ipv6/ip6_output.c, ip6_forward). A kernel without the family has no switch, and forwards none.
func Forwards(family Family) bool {
	if family == IPv6 {
		return on("/proc/sys/net/ipv6/conf/all/forwarding")
	}
	return on("/proc/sys/net/ipv4/ip_forward")
}

func on(sysctl string) bool {
	value, err := os.ReadFile(sysctl)
	return err == nil && strings.TrimSpace(string(value)) != "0"
}
