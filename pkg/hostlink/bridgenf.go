package hostlink

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
)

// BridgeNF says for each family whether iptables sees a bridge's packets with their port. Where it
// does not, a rule can tell two pods of the bridge apart only by the source addresses that they
// write themselves.
type BridgeNF struct{ IPv4, IPv6 bool }

// Has reports whether iptables sees the bridge's packets of a family.
func (b BridgeNF) Has(family ipfamily.Family) bool {
	if family == ipfamily.IPv6 {
		return b.IPv6
	}
	return b.IPv4
}

// bridgeNF reads both switches that the kernel uses (br_nf_pre_routing in
// net/bridge/br_netfilter_hooks.c): that of the namespace, which exists only with the module
// br_netfilter, and that of the bridge, which has no effect without the module. It does not load
// the module: all bridged traffic of the node would begin to pass iptables, which is the
// administrator's decision.
func bridgeNF(index int) (BridgeNF, error) {
	v4, isLoaded, err := readSysctl("bridge-nf-call-iptables")
	if err != nil || !isLoaded {
		return BridgeNF{}, err
	}
	v6, _, err := readSysctl("bridge-nf-call-ip6tables")
	if err != nil {
		return BridgeNF{}, err
	}
	bridge, err := readBridgeSwitches(index)
	if err != nil {
		return BridgeNF{}, err
	}
	return BridgeNF{IPv4: v4 || bridge.IPv4, IPv6: v6 || bridge.IPv6}, nil
}

func readSysctl(name string) (isOn, exists bool, err error) {
	value, err := os.ReadFile("/proc/sys/net/bridge/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	return strings.TrimSpace(string(value)) != "0", true, nil
}

// readBridgeSwitches reads the switches of a bridge by netlink: /sys shows those of the namespace
// that mounted it.
func readBridgeSwitches(index int) (BridgeNF, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	replies, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return BridgeNF{}, err
	}
	var switches BridgeNF
	for _, reply := range replies {
		info, err := nested(reply[unix.SizeofIfInfomsg:], unix.IFLA_LINKINFO, unix.IFLA_INFO_DATA)
		if err != nil {
			return BridgeNF{}, err
		}
		for _, attr := range info {
			switch isOn := len(attr.Value) > 0 && attr.Value[0] != 0; attr.Attr.Type {
			case unix.IFLA_BR_NF_CALL_IPTABLES:
				switches.IPv4 = isOn
			case unix.IFLA_BR_NF_CALL_IP6TABLES:
				switches.IPv6 = isOn
			}
		}
	}
	return switches, nil
}

// nested returns the attributes at a path of nested attribute types, or none if one of the types is
// missing.
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
