package hostlink

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// BridgeNF says for each family whether iptables sees a bridge's packets, and so their port: where it does not, a rule
// cannot tell two pods of the bridge apart but by the source addresses that they write themselves.
type BridgeNF struct{ IPv4, IPv6 bool }

// bridgeNF reads both of the switches that the kernel asks (net/bridge/br_netfilter_hooks.c, br_nf_pre_routing): the
// namespace's, which exists only where br_netfilter is loaded, and the bridge's own, which means nothing without that
// module. It is not loaded here, nor by a rule that needs it: with it, all bridged traffic of the node would begin to pass
// iptables, and that is the administrator's to decide.
func bridgeNF(index int) (BridgeNF, error) {
	v4, loaded, err := sysctl("bridge-nf-call-iptables")
	if err != nil || !loaded {
		return BridgeNF{}, err
	}
	v6, _, err := sysctl("bridge-nf-call-ip6tables")
	if err != nil {
		return BridgeNF{}, err
	}
	own, err := ownBridgeNF(index)
	if err != nil {
		return BridgeNF{}, err
	}
	return BridgeNF{IPv4: v4 || own.IPv4, IPv6: v6 || own.IPv6}, nil
}

// BridgeNFOf is what iptables sees of the bridge of that name, in the calling thread's namespace.
func BridgeNFOf(bridge string) (BridgeNF, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return BridgeNF{}, err
	}
	defer h.Close()
	link, err := h.LinkByName(bridge)
	if err != nil {
		return BridgeNF{}, fmt.Errorf("bridge %s: %w", bridge, err)
	}
	return bridgeNF(link.Attrs().Index)
}

func sysctl(name string) (on, exists bool, err error) {
	value, err := os.ReadFile("/proc/sys/net/bridge/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	return strings.TrimSpace(string(value)) != "0", true, nil
}

// ownBridgeNF reads a bridge's own switches by netlink: under /sys they would be those of the namespace that mounted it.
func ownBridgeNF(index int) (BridgeNF, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	replies, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return BridgeNF{}, err
	}
	var flags BridgeNF
	for _, reply := range replies {
		info, err := nested(reply[unix.SizeofIfInfomsg:], unix.IFLA_LINKINFO, unix.IFLA_INFO_DATA)
		if err != nil {
			return BridgeNF{}, err
		}
		for _, attr := range info {
			switch on := len(attr.Value) > 0 && attr.Value[0] != 0; attr.Attr.Type {
			case unix.IFLA_BR_NF_CALL_IPTABLES:
				flags.IPv4 = on
			case unix.IFLA_BR_NF_CALL_IP6TABLES:
				flags.IPv6 = on
			}
		}
	}
	return flags, nil
}

// nested goes down from attributes into the one of each given type; nothing where one of them is missing.
func nested(b []byte, path ...uint16) ([]syscall.NetlinkRouteAttr, error) {
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		return nil, fmt.Errorf("netlink attributes: %w", err)
	}
	if len(path) == 0 {
		return attrs, nil
	}
	for _, attr := range attrs {
		if attr.Attr.Type&^unix.NLA_F_NESTED == path[0] {
			return nested(attr.Value, path[1:]...)
		}
	}
	return nil, nil
}
