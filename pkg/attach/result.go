package attach

import (
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// ResultIPs returns the addresses of a plugin's result of any version.
func ResultIPs(result types.Result) ([]netip.Addr, error) {
	latest, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, err
	}
	var ips []netip.Addr
	for _, config := range latest.IPs {
		ip, _ := netip.AddrFromSlice(config.Address.IP)
		ips = append(ips, ip.Unmap())
	}
	return ips, nil
}
