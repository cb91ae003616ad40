package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// Changes tells that somebody took something away of the kernel's nftables that could be ours, iptables-nft's rules
// included, or added a rule to the chain where iptables-nft has our jump: one value for however many changes since the last
// was taken. What others do to chains of their own, which in a large cluster is a lot, is none. iptables-legacy changes come
// unsaid. It ends with ctx; an error means that the kernel does not tell.
func Changes(ctx context.Context, log *slog.Logger) (<-chan struct{}, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		return nil, fmt.Errorf("changes of nftables: %w", err)
	}
	changes := make(chan struct{}, 1)
	context.AfterFunc(ctx, func() { conn.Close() })
	go func() {
		for {
			messages, err := conn.Receive()
			if ctx.Err() != nil {
				return
			}
			// Too many at once for the socket may have been any.
			lost := errors.Is(err, unix.ENOBUFS)
			if err != nil && !lost {
				log.Warn("the kernel no longer tells of changes of nftables; they are found by looking", "error", err)
				return
			}
			if !lost && !slices.ContainsFunc(messages, concerns) {
				continue
			}
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}()
	return changes, nil
}

// nfgenmsg is the size of what comes before the attributes (linux/netfilter/nfnetlink.h, struct nfgenmsg).
const nfgenmsg = 4

// chains are those that iptables has our rules in.
var chains = []string{redirect.Chain, "PREROUTING", "FORWARD", "POSTROUTING"}

// concerns tells whether a message says that something is gone from a table or a chain where ours stand, or that a rule came
// to the chain of our jump. The table's name has the same number in each of these messages (linux/netfilter/nf_tables.h,
// NFTA_*_TABLE, NFTA_TABLE_NAME).
func concerns(m netlink.Message) bool {
	if int(m.Header.Type)>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < nfgenmsg {
		return false
	}
	kind := int(m.Header.Type) & 0xff
	switch kind {
	case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWRULE:
	default:
		return false
	}
	var table, chain string
	attributes, err := netlink.NewAttributeDecoder(m.Data[nfgenmsg:])
	if err != nil {
		return true
	}
	for attributes.Next() {
		switch attributes.Type() {
		case unix.NFTA_RULE_TABLE:
			table = attributes.String()
		case unix.NFTA_RULE_CHAIN:
			if kind == unix.NFT_MSG_DELRULE || kind == unix.NFT_MSG_NEWRULE {
				chain = attributes.String()
			}
		case unix.NFTA_CHAIN_NAME:
			if kind == unix.NFT_MSG_DELCHAIN {
				chain = attributes.String()
			}
		}
	}
	switch {
	case attributes.Err() != nil:
		return true
	case kind == unix.NFT_MSG_NEWRULE: // it may stand above the jump of iptables-nft
		return table == "nat" && chain == "PREROUTING"
	case table == redirect.Table, kind == unix.NFT_MSG_DELTABLE:
		return true
	case kind == unix.NFT_MSG_DELRULE, kind == unix.NFT_MSG_DELCHAIN:
		return slices.Contains(chains, chain)
	}
	return false
}
