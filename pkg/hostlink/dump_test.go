package hostlink

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

// TestDump reads lists that are interrupted several times, always, or before another error.
func TestDump(t *testing.T) {
	interrupted, broken := fmt.Errorf("dump: %w", netlink.ErrDumpInterrupted), errors.New("broken")
	for name, tc := range map[string]struct {
		interruptions int
		then          error
		want          []int
		err           error
		reads         int
	}{
		"not interrupted":                 {0, nil, []int{1, 2}, nil, 1},
		"interrupted twice":               {2, nil, []int{1, 2}, nil, 3},
		"interrupted, then another error": {1, broken, nil, broken, 2},
		"always interrupted":              {dumps, nil, nil, netlink.ErrDumpInterrupted, dumps},
	} {
		t.Run(name, func(t *testing.T) {
			reads := 0
			got, err := Dump(func() ([]int, error) {
				if reads++; reads <= tc.interruptions {
					return []int{1}, interrupted // an incomplete list
				}
				if tc.then != nil {
					return nil, tc.then
				}
				return []int{1, 2}, nil
			})
			if !errors.Is(err, tc.err) || reads != tc.reads {
				t.Errorf("read %d times, %v; want %d times, %v", reads, err, tc.reads, tc.err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
