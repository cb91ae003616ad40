package hostlink

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// dumps is how often a list is asked for that changes while it is read.
const dumps = 10

// dump asks the kernel for a list until it is whole. Where something is made or removed meanwhile the kernel says that the
// list may lack entries or have some twice (NLM_F_DUMP_INTR): on a node whose pods come and go that is no fault, and half a
// list is no answer.
func dump[T any](ask func() ([]T, error)) (list []T, err error) {
	for range dumps {
		if list, err = ask(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return nil, err
}
