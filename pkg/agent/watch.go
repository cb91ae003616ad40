package agent

import (
	"context"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/netlinkwatch"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
)

// watchRules calls notify when something was removed from the kernel's nftables that can be ours,
// with iptables-nft's rules. Other programs' changes of their own chains, which are many in a large
// cluster, are ignored. iptables-legacy does not notify. It returns when ctx ends, or an error if
// the kernel does not notify.
func watchRules(ctx context.Context, notify func()) error {
	return netlinkwatch.Watch(ctx, unix.NETLINK_NETFILTER, 1<<(unix.NFNLGRP_NFTABLES-1), isRelevant, notify)
}

// nfgenmsgSize is the size of struct nfgenmsg, before the attributes (linux/netfilter/nfnetlink.h).
const nfgenmsgSize = 4

// iptablesChains are the chains with our rules in iptables.
var iptablesChains = []string{rules.IPTablesChain, "PREROUTING", "FORWARD", "POSTROUTING"}

// isRelevant reports whether a message says that something was removed from a table or a chain that
// can have our rules. The table's name has the same attribute number in all these messages
// (linux/netfilter/nf_tables.h, NFTA_*_TABLE, NFTA_TABLE_NAME).
func isRelevant(m netlink.Message) bool {
	if int(m.Header.Type)>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < nfgenmsgSize {
		return false
	}
	kind := int(m.Header.Type) & 0xff
	switch kind {
	case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET, unix.NFT_MSG_DELSETELEM:
	default:
		return false
	}
	var table, chain string
	attributes, err := netlink.NewAttributeDecoder(m.Data[nfgenmsgSize:])
	if err != nil {
		return true
	}
	for attributes.Next() {
		switch t := attributes.Type(); {
		case t == unix.NFTA_RULE_TABLE:
			table = attributes.String()
		case t == unix.NFTA_RULE_CHAIN && kind == unix.NFT_MSG_DELRULE, t == unix.NFTA_CHAIN_NAME && kind == unix.NFT_MSG_DELCHAIN:
			chain = attributes.String()
		}
	}
	return attributes.Err() != nil || table == rules.Table || kind == unix.NFT_MSG_DELTABLE || slices.Contains(iptablesChains, chain)
}
