package hostlink

import (
	"errors"
	"io/fs"
	"os"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
)

// bridgeNF returns the families for which iptables sees the packets of bridges and the bridge port
// that each came from. Without the port, a rule can distinguish two pods of a bridge only by their
// source addresses, which the pods can forge.
//
// The sysctls exist only if the module br_netfilter is loaded. This program does not load it: all
// bridged traffic of the node would then pass iptables, which is the administrator's decision.
// bridgeNF reads only the node's sysctls. A bridge whose own switch is on while the node's is off
// counts as off.
func bridgeNF() (map[ipfamily.Family]bool, error) {
	isOn := make(map[ipfamily.Family]bool)
	for family, name := range map[ipfamily.Family]string{
		ipfamily.IPv4: "bridge-nf-call-iptables", ipfamily.IPv6: "bridge-nf-call-ip6tables",
	} {
		value, err := os.ReadFile("/proc/sys/net/bridge/" + name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		isOn[family] = err == nil && strings.TrimSpace(string(value)) != "0"
	}
	return isOn, nil
}
