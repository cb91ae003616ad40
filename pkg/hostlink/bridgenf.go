package hostlink

import (
	"errors"
	"io/fs"
	"os"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
)

// bridgeNF returns the families for which iptables sees the packets of bridges with their port.
// Where it does not, a rule can tell two pods of a bridge apart only by the source addresses that
// they write themselves.
//
// The switches exist only with the module br_netfilter. Loading it is the administrator's decision:
// all bridged traffic of the node would begin to pass iptables. A bridge has switches of its own,
// which this function does not read, so a bridge on which only these are on counts as off.
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
