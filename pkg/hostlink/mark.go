package hostlink

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// MarkError is the error of a mark that routing rules of the node ask for.
type MarkError struct {
	Mark uint32
	Rule string
}

func (e *MarkError) Error() string {
	return fmt.Sprintf("mark %#x is also what a routing rule of the node asks for (%s)", e.Mark, e.Rule)
}

// FreeMark tells whether packets that have the mark and no other bit would meet none of the node's routing rules by it (ip
// rule, fwmark); the error is a *MarkError where one would.
func FreeMark(mark uint32) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := dump(func() ([]netlink.Rule, error) { return h.RuleList(family) })
		if err != nil {
			continue // a kernel without the family
		}
		for _, r := range rules {
			mask := uint32(0xffffffff)
			if r.Mask != nil {
				mask = *r.Mask
			}
			if r.Mark != 0 && mark&mask == r.Mark {
				return &MarkError{mark, fmt.Sprintf("ip rule %d, fwmark %#x/%#x", r.Priority, r.Mark, mask)}
			}
		}
	}
	return nil
}
