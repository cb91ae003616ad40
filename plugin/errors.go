package main

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
)

// The plugin's own error codes: the CNI specification reserves those from 100 for plugins
// ("Error"). Of the specification's codes, it uses 4 (CNI_ARGS, CNI_CONTAINERID), 5 (the result
// could not be written), 6 and 7 (the network configuration), 8 (CNI_NETNS), 11 (another process
// holds a lock: try again) and 50 (STATUS: no ADD can succeed now).
const (
	// codeLink is an interface that is missing, or whose packets cannot be matched on the host.
	codeLink uint = 100 + iota
	// codeBridge is a bridged pod whose port iptables does not see.
	codeBridge
	// codeProxyIP is a node without an address that pods can dial, and without a configured proxyIP.
	codeProxyIP
	// codeNoIPTables is a node without an iptables command that is needed.
	codeNoIPTables
	// codeRules is rules that could not be made; the attachment has none.
	codeRules
	// codeState is a record that could not be written or read.
	codeState
	// codeAddresses is a prevResult whose addresses the interface does not hold.
	codeAddresses
	// codeCheck is a CHECK that found something missing or changed; the message lists it.
	codeCheck
	// codeGC is a GC that had to leave something behind; the message lists it.
	codeGC
)

// codes are the codes of the errors of package attach, and how to solve them.
var codes = map[attach.Kind]struct {
	code    uint
	details string
}{
	attach.KindLink:      {codeLink, ""},
	attach.KindAddresses: {codeAddresses, ""},
	attach.KindProxyIP:   {codeProxyIP, `set "proxyIP" to an address of this node, of the pod's family`},
	attach.KindBridge:    {codeBridge, "on the node: modprobe br_netfilter && sysctl -w net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1"},
	attach.KindRules:     {codeRules, ""},
	attach.KindState:     {codeState, ""},
}

// toCNIError returns an error with the code of its cause, or with the given one if the cause has
// none.
func toCNIError(err error, otherwise uint) error {
	if err == nil {
		return nil
	}
	if known, ok := errors.AsType[*types.Error](err); ok {
		return known
	}
	code, details := otherwise, ""
	if e, ok := errors.AsType[*attach.Error](err); ok {
		code, details = codes[e.Kind].code, codes[e.Kind].details
	}
	_, unsupported := errors.AsType[*hostlink.UnsupportedError](err)
	switch {
	case errors.Is(err, rules.ErrBusy), errors.Is(err, attachment.ErrLocked):
		code, details = types.ErrTryAgainLater, ""
	case errors.Is(err, rules.ErrNoIPTables) && errors.Is(err, rules.ErrUnsupported):
		code, details = codeNoIPTables, "use a kernel with nftables, or install iptables on the node"
	case errors.Is(err, rules.ErrNoIPTables):
		code = codeNoIPTables
		details = `install iptables on the node, or set "backend" to "nftables", which needs no command`
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

// isTemporary reports whether a later attempt can succeed.
func isTemporary(err error) bool {
	return errors.Is(err, rules.ErrBusy) || errors.Is(err, attachment.ErrLocked)
}
