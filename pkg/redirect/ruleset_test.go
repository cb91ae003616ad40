package redirect

import (
	"encoding/binary"
	"os/exec"
	"regexp"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

var (
	nftElements = regexp.MustCompile(`(?s)elements = \{ (.*?) \}`)
	nftBetween  = regexp.MustCompile(`,\s+`)
)

// ruleset is all of the namespace's nftables but for what iptables has there: the tables in the order of their families, and
// in each set or map, which the kernel keeps as a hash, the elements a line each, in order.
func (n *namespace) ruleset() string {
	n.Helper()
	var tables []string
	for _, t := range n.nftTables() {
		if name := strings.Fields(t)[2]; !slices.Contains([]string{"filter", "mangle", "nat"}, name) {
			tables = append(tables, t)
		}
	}
	return strings.Join(tables, "\n")
}

func (n *namespace) nftTables() []string {
	n.Helper()
	var tables []string
	for line := range strings.Lines(n.run("nft list ruleset")) {
		switch {
		case strings.HasPrefix(line, "#"): // iptables-nft's warning
		case strings.HasPrefix(line, "table "):
			tables = append(tables, line)
		default:
			tables[len(tables)-1] += line
		}
	}
	for i, t := range tables {
		tables[i] = nftElements.ReplaceAllStringFunc(t, func(all string) string {
			elements := nftBetween.Split(nftElements.FindStringSubmatch(all)[1], -1)
			slices.Sort(elements)
			return "elements = {\n\t\t\t" + strings.Join(elements, "\n\t\t\t") + "\n\t\t}"
		})
	}
	slices.Sort(tables)
	return tables
}

// generation is the number of the last transaction of the namespace's nftables (linux/netfilter/nf_tables.h, NFTA_GEN_ID),
// iptables-nft's included.
func (n *namespace) generation() uint32 {
	n.Helper()
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	n.must(err)
	defer conn.Close()
	replies, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, 0, 0, 0}, // struct nfgenmsg
	})
	n.must(err)
	attributes, err := netlink.NewAttributeDecoder(replies[0].Data[4:])
	n.must(err)
	attributes.ByteOrder = binary.BigEndian
	for attributes.Next() {
		if attributes.Type() == unix.NFTA_GEN_ID {
			return attributes.Uint32()
		}
	}
	n.Fatal("the kernel does not tell its generation")
	return 0
}

// transactions asserts how many changes of nftables something takes.
func (n *namespace) transactions(what string, want uint32, do func()) {
	n.Helper()
	before := n.generation()
	do()
	if got := n.generation() - before; got != want {
		n.Errorf("%s took %d transactions, want %d", what, got, want)
	}
}

// sh runs commands whose arguments are of several words.
func (n *namespace) sh(script string) {
	n.Helper()
	if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
		n.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// nftables is the node's backend of that name.
func (n *namespace) nftables() Backend {
	n.Helper()
	b, err := n.Backend(NFTables)
	n.must(err)
	return b
}

func (n *namespace) wantRuleset(when, want string) {
	n.Helper()
	if got := n.ruleset(); got != want {
		n.Errorf("%s:\n%s", when, diff(want, got))
	}
}
