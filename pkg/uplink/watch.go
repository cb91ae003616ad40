package uplink

import (
	"context"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netlinkwatch"
)

// groups are the multicast groups of interfaces, routes and addresses.
const groups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR

// Watch calls notify when an interface, a route or an address changes that can concern the guard,
// until ctx ends. Interfaces and routes of pods do not concern it. The error means that the kernel
// does not notify.
func Watch(ctx context.Context, metadata netip.Addr, notify func()) error {
	services := []netip.Addr{metadata, attachment.MetadataIPv6}
	concerns := func(m netlink.Message) bool { return concernsGuard(m, services) }
	return netlinkwatch.Watch(ctx, unix.NETLINK_ROUTE, groups, concerns, notify)
}

// The sizes of the structures before the attributes (linux/rtnetlink.h, linux/if_addr.h).
const ifInfoSize, routeSize, ifAddrSize = 16, 12, 8

func concernsGuard(m netlink.Message, services []netip.Addr) bool {
	switch m.Header.Type {
	case unix.RTM_NEWLINK: // a bridge's hardware address can change with its ports
		return len(m.Data) >= ifInfoSize && m.Data[0] != unix.AF_BRIDGE &&
			slices.Contains(append(uplinkKinds, "bridge"), kindOf(m.Data[ifInfoSize:]))
	case unix.RTM_NEWROUTE:
		return len(m.Data) >= routeSize && isRouteMessageTo(m.Data, services)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return len(m.Data) >= ifAddrSize && m.Data[3] == unix.RT_SCOPE_UNIVERSE
	}
	return false
}

// kindOf returns the kind of an interface: that of IFLA_INFO_KIND, or "device".
func kindOf(attributes []byte) string {
	kind := "device"
	decoder, err := netlink.NewAttributeDecoder(attributes)
	if err != nil {
		return kind
	}
	for decoder.Next() {
		if decoder.Type() == unix.IFLA_LINKINFO {
			decoder.Nested(func(info *netlink.AttributeDecoder) error {
				for info.Next() {
					if info.Type() == unix.IFLA_INFO_KIND {
						kind = info.String()
					}
				}
				return nil
			})
		}
	}
	return kind
}

// isRouteMessageTo reports whether a struct rtmsg, with its attributes, is of a route to one of the
// services.
func isRouteMessageTo(data []byte, services []netip.Addr) bool {
	family, length := data[0], int(data[1])
	decoder, err := netlink.NewAttributeDecoder(data[routeSize:])
	if err != nil {
		return true
	}
	destination := netip.IPv4Unspecified()
	if family == unix.AF_INET6 {
		destination = netip.IPv6Unspecified()
	}
	for decoder.Next() {
		if decoder.Type() == unix.RTA_DST {
			destination, _ = netip.AddrFromSlice(decoder.Bytes())
		}
	}
	return slices.ContainsFunc(services, netip.PrefixFrom(destination, length).Contains)
}
