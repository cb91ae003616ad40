package hostlink

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// dumps bounds how often an interrupted list is read again.
const dumps = 10

// Dump reads a list from the kernel until it is complete. If entries are added or removed during
// the dump, the kernel marks it (NLM_F_DUMP_INTR): the list can lack entries or have some twice. On
// a node whose pods come and go this is normal.
func Dump[T any](read func() ([]T, error)) (list []T, err error) {
	for range dumps {
		if list, err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return nil, err
}
