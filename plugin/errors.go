package main

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// The plugin's own error codes; the CNI specification leaves it those from 100 ("Error"). Of the specification's, it uses
// 4 (CNI_ARGS, CNI_CONTAINERID), 5 (the result could not be written), 6 and 7 (the network configuration), 8 (CNI_NETNS),
// 11 (another process holds a lock: try again) and 50 (STATUS: no ADD can succeed now).
const (
	// codeLink is an interface that is missing, or whose packets cannot be matched on the host.
	codeLink uint = 100 + iota
	// codeBridgeNF is a bridged pod on a node where iptables does not see bridged packets.
	codeBridgeNF
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
)

// coded gives an error the code of what is at its root, and the given one where that has none.
func coded(err error, otherwise uint) error {
	var known *types.Error
	var unsupported *hostlink.UnsupportedError
	code, details := otherwise, ""
	switch {
	case err == nil:
		return nil
	case errors.As(err, &known):
		return known
	case errors.Is(err, redirect.ErrBusy), errors.Is(err, attachment.ErrLocked):
		code = types.ErrTryAgainLater
	case errors.Is(err, redirect.ErrNoIPTables):
		code = codeNoIPTables
		details = `install iptables on the node, or set "backend" to a form that it has`
	case errors.Is(err, hostlink.ErrNetns):
		code = types.ErrInvalidNetNS
	case errors.Is(err, hostlink.ErrNoInterface):
		code = codeLink
		details = "chain kube2iam-cni after the plugin that makes the interface"
	case errors.As(err, &unsupported):
		code = codeLink
		details = "pods of this network cannot be given credentials; take kube2iam-cni out of its plugins"
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
