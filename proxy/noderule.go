package main

import (
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"

	"github.com/coreos/go-iptables/iptables"
)

// addNodeRule adds the rule of kube2iam's --iptables: it redirects to the proxy all packets for the
// metadata service that enter by the host interface. It is for nodes whose CNI cannot be chained.
func addNodeRule(o *options, log *slog.Logger) error {
	if !o.metadataIP.IsValid() {
		return &usageError{fmt.Errorf("--iptables: --metadata-addr %q is not an IP address", o.metadataAddr)}
	}
	in := []string{"-i", o.hostInterface}
	if name, negated := strings.CutPrefix(o.hostInterface, "!"); negated {
		in = []string{"!", "-i", strings.TrimSpace(name)}
	}
	// iptables takes a name that ends in "+" for a prefix, of interfaces that may come later.
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
	proxy := net.JoinHostPort(o.hostIP.String(), strconv.Itoa(int(o.appPort)))
	rule := append(in, "-p", "tcp", "-d", o.metadataIP.String(), "--dport", "80", "-j", "DNAT", "--to-destination", proxy)
	if err := ipt.AppendUnique("nat", "PREROUTING", rule...); err != nil {
		return fmt.Errorf("--iptables: %w", err)
	}
	log.Warn("one rule redirects the whole node: any pod can forge the address of another pod. "+
		"--iptables, --host-interface and --host-ip are needless if kube2iam-cni is chained into the CNI configuration",
		"interface", o.hostInterface)
	return nil
}
