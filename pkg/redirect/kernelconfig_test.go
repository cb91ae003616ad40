package redirect

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// withoutExpression makes the node's kernel one that refuses every batch with a part, as it does
// without the part's module. Its tables are empty, and it takes no other batch either.
func (n *namespace) withoutExpression(part string, refusal error) {
	n.netlink = []nftables.ConnOption{nftables.WithTestDial(func(request []netlink.Message) ([]netlink.Message, error) {
		if len(request) == 0 {
			return nil, nil
		}
		if request[0].Header.Type != unix.NFNL_MSG_BATCH_BEGIN {
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

// TestKernelLacksAnOption is a kernel without one of the modules that the backend needs: ADD fails,
// and says which option of the kernel's configuration would help. It makes no rules without the
// part that is missing.
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
		n := newNamespace(t)
		n.withoutExpression(part, tc.refusal)
		b, err := n.Choose("auto")
		n.must(err)
		if b.Form() != NFTables {
			t.Fatalf("auto chose %s", b.Form())
		}
		err = b.Add(t.Context(), baseDual, routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"))
		_, lacks, _ := strings.Cut(fmt.Sprint(err), "(the kernel lacks ")
		lacks, _, _ = strings.Cut(lacks, ")")
		if diff := cmp.Diff(tc.want, lacks); !errors.Is(err, ErrUnsupported) || diff != "" {
			t.Errorf("%q: %v\n%s", part, err, diff)
		}
	}
}

// TestKernelLacksNothing holds that the question leaves nothing in a kernel that has it all.
func TestKernelLacksNothing(t *testing.T) {
	n := newNamespace(t)
	b := n.Node.nftables()
	tables := b.tables(Base{Metadata: baseDual.Metadata, Guard: true}, true)
	if lacking := b.ports.lacking(tables); len(lacking) > 0 {
		t.Errorf("lacks %q", lacking)
	}
	// The control: a set that is not there is the kernel's answer to a module that is not there, too.
	absent := []expr.Any{&expr.Lookup{SourceRegister: reg0, SetName: "absent"}}
	if err := b.ports.try(tables[1].Family, tables[1].chains[0].Chain, absent); !errors.Is(err, ErrUnsupported) {
		t.Errorf("control: %v", err)
	}
	for _, table := range tables {
		for _, c := range table.chains {
			n.must(b.ports.try(table.Family, c.Chain, nil))
		}
	}
	if left := n.run("nft list ruleset"); left != "" {
		t.Errorf("left %s", left)
	}
}
