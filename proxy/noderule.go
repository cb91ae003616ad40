package main

import (
	"fmt"
	"log/slog"
	"net"
	"strings"

	"github.com/coreos/go-iptables/iptables"
)

// addNodeRule installs the one rule of kube2iam's --iptables: everything that comes by the host interface and is bound for
// the metadata service goes to the proxy. It is for nodes whose CNI cannot be chained; the plugin makes it needless.
func addNodeRule(o *options, log *slog.Logger) error {
	if !o.metadataIP.IsValid() {
		return &usageError{fmt.Errorf("--iptables: --metadata-addr %q is not an IP address", o.metadataAddr)}
	}
	in := []string{"-i", o.hostInterface}
	if name, not := strings.CutPrefix(o.hostInterface, "!"); not {
		in = []string{"!", "-i", strings.TrimSpace(name)}
	}
	// "+" ends a prefix of names, none of which need exist yet.
	if name := in[len(in)-1]; !strings.HasSuffix(name, "+") {
		if _, err := net.InterfaceByName(name); err != nil {
			return fmt.Errorf("--host-interface %q: %w", name, err)
		}
	}
	family := iptables.ProtocolIPv4
	if o.metadataIP.Is6() {
		family = iptables.ProtocolIPv6
	}
	ipt, err := iptables.New(iptables.IPFamily(family), iptables.Timeout(5))
	if err != nil {
		return fmt.Errorf("--iptables: %w", err)
	}
	rule := append(in, "-p", "tcp", "-d", o.metadataIP.String(), "--dport", "80",
		"-j", "DNAT", "--to-destination", net.JoinHostPort(o.hostIP.String(), port(o.appPort)))
	if err := ipt.AppendUnique("nat", "PREROUTING", rule...); err != nil {
		return fmt.Errorf("--iptables: %w", err)
	}
	log.Warn("one rule redirects the whole node: any pod can forge its neighbour's address. Chaining kube2iam-cni into the CNI "+
		"configuration makes --iptables, --host-interface and --host-ip needless", "interface", o.hostInterface)
	return nil
}
