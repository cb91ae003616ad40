package rules

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// withoutExpression makes the kernel refuse each transaction that contains a part, as it does
// without the part's module. It answers that its tables are empty, and accepts no other transaction
// either.
func (h *host) withoutExpression(part string, refusal error) {
	h.ConnOptions = []nftables.ConnOption{nftables.WithTestDial(func(request []netlink.Message) ([]netlink.Message, error) {
		if len(request) == 0 {
			return nil, nil
		}
		if isBatch := request[0].Header.Type == unix.NFNL_MSG_BATCH_BEGIN; !isBatch && request[0].Header.Flags&netlink.Dump == 0 {
			return nil, unix.ENOENT
		} else if !isBatch {
			return []netlink.Message{{Header: netlink.Header{
				Type: netlink.Done, Flags: netlink.Multi, Sequence: request[0].Header.Sequence, PID: request[0].Header.PID,
			}, Data: make([]byte, 4)}}, nil
		}
		for _, m := range request {
			if bytes.Contains(m.Data, []byte(part)) {
				return nil, refusal
			}
		}
		return nil, unix.EINVAL
	})}
}

// TestKernelLacksAnOption has a kernel without one of the modules that the rules need: ADD fails,
// and names the option of the kernel's configuration that would help.
func TestKernelLacksAnOption(t *testing.T) {
	for part, tc := range map[string]struct {
		refusal error
		want    string
	}{
		"fib\x00":    {unix.ENOENT, "CONFIG_NFT_FIB_IPV4, CONFIG_NFT_FIB_IPV6"},
		"reject\x00": {unix.ENOENT, "CONFIG_NFT_REJECT"},
		"nat\x00":    {unix.ENOENT, "CONFIG_NFT_NAT"},
		Table:        {unix.EAFNOSUPPORT, "CONFIG_NF_TABLES_IPV4, CONFIG_NF_TABLES_IPV6"},
	} {
		h := newHost(t)
		h.withoutExpression(part, tc.refusal)
		err := h.Attach(t.Context(), routed("c1", "veth0", "10.1.0.5", "fd00:1::5"), nil)
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "(the kernel lacks "+tc.want+")") {
			t.Errorf("%q: %v, want %s", part, err, tc.want)
		}
	}
}
