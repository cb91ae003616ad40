package hostlink

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// dumps bounds how often a list is read.
const dumps = 10

// Dump reads a list from the kernel, and again if the list is inconsistent, up to ten times. If
// entries are added or removed during a dump, the kernel marks the dump with NLM_F_DUMP_INTR: the
// list may lack entries or have some twice. On a node whose pods come and go this is normal.
func Dump[T any](read func() ([]T, error)) (list []T, err error) {
	for range dumps {
		if list, err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return nil, err
}
