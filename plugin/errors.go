package main

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// The plugin's own error codes; the CNI specification leaves it those from 100 ("Error"). Of the specification's, it uses
// 4 (CNI_ARGS, CNI_CONTAINERID), 5 (the result could not be written), 6 and 7 (the network configuration), 8 (CNI_NETNS),
// 11 (another process holds a lock: try again) and 50 (STATUS: no ADD can succeed now).
const (
	// codeLink is an interface that is missing, or whose packets cannot be matched on the host.
	codeLink uint = 100 + iota
	// codeBridge is a bridged pod whose port cannot be told from its neighbours' on this node.
	codeBridge
	// codeProxyIP is a node that has no address which pods could dial, and no proxyIP configured.
	codeProxyIP
	// codeNoIPTables is a node without the iptables command that the configuration asks for.
	codeNoIPTables
	// codeRules is rules that could not be programmed; none of them stand.
	codeRules
	// codeState is a record that could not be written or read.
	codeState
	// codeAddresses is a prevResult whose addresses the interface does not hold.
	codeAddresses
	// codeCheck is a CHECK that found something missing or changed; the message lists it.
	codeCheck
	// codeGC is a GC that had to leave something behind; the message lists it.
	codeGC
	// codeMark is a mark that the node's routing rules ask for.
	codeMark
)

// ofKind are the codes of what the node says, and what to do about it.
var ofKind = map[node.Kind]struct {
	code    uint
	details string
}{
	node.Link:         {codeLink, ""},
	node.Addresses:    {codeAddresses, ""},
	node.ProxyAddress: {codeProxyIP, `set "proxyIP" to an address of this node, of the pod's family`},
	node.Bridge:       {codeBridge, "on the node: modprobe br_netfilter && sysctl -w net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1"},
	node.Mark:         {codeMark, `set "mark" to a bit that nothing else on the node uses, here and for the agent`},
	node.Rules:        {codeRules, ""},
	node.State:        {codeState, ""},
}

// coded gives an error the code of what is at its root, and the given one where that has none.
func coded(err error, otherwise uint) error {
	if err == nil {
		return nil
	}
	if known, ok := errors.AsType[*types.Error](err); ok {
		return known
	}
	code, details := otherwise, ""
	if e, ok := errors.AsType[*node.Error](err); ok {
		code, details = ofKind[e.Kind].code, ofKind[e.Kind].details
	}
	_, unsupported := errors.AsType[*hostlink.UnsupportedError](err)
	switch {
	case errors.Is(err, redirect.ErrBusy), errors.Is(err, attachment.ErrLocked):
		code, details = types.ErrTryAgainLater, ""
	case errors.Is(err, redirect.ErrNoIPTables) && errors.Is(err, redirect.ErrUnsupported):
		code, details = codeNoIPTables, "use a kernel with nftables, or install iptables-legacy on the node"
	case errors.Is(err, redirect.ErrNoIPTables):
		code = codeNoIPTables
		details = `install iptables on the node, or set "backend" to a form that it has, or to "nftables", which needs no command`
	case errors.Is(err, hostlink.ErrNetns):
		code = types.ErrInvalidNetNS
	case errors.Is(err, hostlink.ErrNoInterface):
		details = "chain kube2iam-cni after the plugin that makes the interface"
	case unsupported:
		details = `take kube2iam-cni out of the network's plugins, or set "datapath" to "pod": docs/compatibility.md says what that cannot promise`
	}
	return types.NewError(code, err.Error(), details)
}

func cniError(code uint, details, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), details)
}

// passing tells an error that a later try may not meet.
func passing(err error) bool {
	return errors.Is(err, redirect.ErrBusy) || errors.Is(err, attachment.ErrLocked)
}
