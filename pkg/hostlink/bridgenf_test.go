package hostlink

import (
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	ipv4Switch = unix.IFLA_BR_NF_CALL_IPTABLES
	ipv6Switch = unix.IFLA_BR_NF_CALL_IP6TABLES
)

// bridgeNFAttr turns a bridge's own switch on, as "ip link set br0 type bridge nf_call_iptables 1" does.
func bridgeNFAttr(which int) func(*node, netlink.Link) {
	return func(n *node, bridge netlink.Link) {
		n.Helper()
		req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(bridge.Attrs().Index)
		req.AddData(msg)
		info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
		info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
		info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(which, nl.Uint8Attr(1))
		req.AddData(info)
		_, err := req.Execute(unix.NETLINK_ROUTE, 0)
		n.must(err)
	}
}

func TestNestedRefusesWhatIsNoAttribute(t *testing.T) {
	// An attribute that says that it is longer than what there is.
	if got, err := nested([]byte{0xff, 0, byte(unix.IFLA_LINKINFO), 0}, unix.IFLA_LINKINFO); err == nil {
		t.Errorf("got %v, want an error", got)
	}
}
