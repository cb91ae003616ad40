package agent

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
)

// TestUnguardedFamilyIsLoggedOnce has a kernel that refuses the guard of IPv6: the warning of
// package rules is logged once, and not in each round.
func TestUnguardedFamilyIsLoggedOnce(t *testing.T) {
	b := newBed(t, "nftables")
	b.node.Rules.ConnOptions = []nftables.ConnOption{nftables.WithTestDial(func(request []netlink.Message) ([]netlink.Message, error) {
		if len(request) == 0 {
			return nil, nil
		}
		if request[0].Header.Flags&netlink.Dump != 0 {
			return []netlink.Message{{Header: netlink.Header{
				Type: netlink.Done, Flags: netlink.Multi, Sequence: request[0].Header.Sequence, PID: request[0].Header.PID,
			}, Data: make([]byte, 4)}}, nil
		}
		if request[0].Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE {
			return nil, unix.ENOENT
		}
		for _, m := range request {
			if m.Data[0] == unix.AF_INET6 && bytes.Contains(m.Data, []byte(rules.Table)) {
				return nil, unix.EAFNOSUPPORT
			}
		}
		return nil, unix.EPERM
	})}
	for range 3 {
		if err := b.Round(t.Context()); err == nil {
			t.Error("the kernel refuses all, and the round has no error")
		}
		b.Close()
	}
	if output := b.Logged(); strings.Count(output, "cannot guard an IP family") != 1 {
		t.Errorf("the log is\n%s", output)
	}
}
