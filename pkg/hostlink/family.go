package hostlink

import "os"

// Has tells whether the kernel has a family. One that it has, it may come to forward at any time.
func Has(family Family) bool {
	if family == IPv4 {
		return true
	}
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}
