package hostlink

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

// TestDump has lists that are interrupted some times before they come whole, or always, or fail for another reason.
func TestDump(t *testing.T) {
	interrupted, broken := fmt.Errorf("dump: %w", netlink.ErrDumpInterrupted), errors.New("broken")
	for name, tc := range map[string]struct {
		interruptions int
		then          error
		want          []int
		err           error
		asked         int
	}{
		"whole at once":            {0, nil, []int{1, 2}, nil, 1},
		"interrupted twice":        {2, nil, []int{1, 2}, nil, 3},
		"interrupted, then broken": {1, broken, nil, broken, 2},
		"always interrupted":       {dumps, nil, nil, netlink.ErrDumpInterrupted, dumps},
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			got, err := dump(func() ([]int, error) {
				if asked++; asked <= tc.interruptions {
					return []int{1}, interrupted // half of it
				}
				if tc.then != nil {
					return nil, tc.then
				}
				return []int{1, 2}, nil
			})
			if !errors.Is(err, tc.err) || asked != tc.asked {
				t.Errorf("asked %d times, %v; want %d times, %v", asked, err, tc.asked, tc.err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
