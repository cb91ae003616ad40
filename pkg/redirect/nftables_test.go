package redirect

import "testing"

// What stands for the pods of the tests in the tables of the nftables backend.
const (
	c1Routed  = `"veth0" . 10.1.0.5 comment "c1@eth0" : 192.168.7.2 . 8181`
	c2Bridged = `10.1.0.6 comment "c2@eth0" : 192.168.7.2 . 8181`
)

var (
	c2Ports4 = portsGolden{holders4: elements(`"veth1" . 10.1.0.6 comment "c2@eth0"`), held4: elements(`10.1.0.6 comment "c2@eth0"`)}
	c2Ports  = c2Ports4.dual()
)

// dual has for IPv6 what there is for IPv4.
func (p portsGolden) dual() portsGolden {
	return portsGolden{elements(service6), p.holders4, p.held4, inIPv6(p.holders4), inIPv6(p.held4)}
}

func TestNFTablesAdd(t *testing.T) {
	routed4, bridged4 := ipGolden(true, elements(c1Routed), ""), ipGolden(true, "", elements(c2Bridged))
	open4, openBridged4 := ipGolden(false, elements(c1Routed), ""), ipGolden(false, "", elements(c2Bridged))
	for name, tc := range map[string]struct {
		base   Base
		add    Attachment
		golden string
	}{
		"routed, IPv4":                      {base4, routed("c1@eth0", "veth0", "10.1.0.5"), routed4},
		"routed, IPv4, no guard":            {open(base4), routed("c1@eth0", "veth0", "10.1.0.5"), open4},
		"routed, dual stack":                {baseDual, routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"), golden(routed4, inIPv6(routed4))},
		"routed, dual stack, no guard":      {open(baseDual), routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"), golden(open4, inIPv6(open4))},
		"routed, one family of two guarded": {baseDual, routed("c1@eth0", "veth0", "10.1.0.5"), golden(routed4, inIPv6(ipGolden(true, "", "")))},
		"bridged, IPv4":                     {base4, bridged("c2@eth0", "veth1", "10.1.0.6"), golden(c2Ports4.table(true), bridged4)},
		"bridged, IPv4, no guard":           {open(base4), bridged("c2@eth0", "veth1", "10.1.0.6"), golden(c2Ports4.table(false), openBridged4)},
		"bridged, dual stack":               {baseDual, bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6"), golden(c2Ports.table(true), bridged4, inIPv6(bridged4))},
		"bridged, dual stack, no guard":     {open(baseDual), bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6"), golden(c2Ports.table(false), openBridged4, inIPv6(openBridged4))},
		"nothing redirected, two guarded":   {baseDual, routed("c1@eth0", "veth0"), golden(ipGolden(true, "", ""), inIPv6(ipGolden(true, "", "")))},
		"bridged, nothing redirected":       {base4, bridged("c2@eth0", "veth1"), golden(portsGolden{}.table(true), ipGolden(true, "", ""))},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNamespace(t)
			n.transactions("ADD", 1, func() { n.must(n.nftables().Add(t.Context(), tc.base, tc.add)) })
			n.wantRuleset("after ADD", tc.golden)
			n.forget()
			n.transactions("the same ADD", 0, func() { n.must(n.nftables().Add(t.Context(), tc.base, tc.add)) })
			n.wantRuleset("after the same ADD", tc.golden)
			missing, err := n.nftables().Missing(tc.base, tc.add)
			if err != nil || len(missing) > 0 {
				t.Errorf("missing: %v, %v", missing, err)
			}
		})
	}
}

func open(b Base) Base { b.Guard = false; return b }

// TestNFTablesBaseComesBack breaks the base under a pod that is attached: the next pod's ADD makes it whole, in one
// transaction, and leaves tables that are whole alone.
func TestNFTablesBaseComesBack(t *testing.T) {
	first, second := bridged("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"), bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")
	want := standingAfter(t, baseDual, first, second)
	for name, damage := range map[string]string{
		"nothing":                   "list ruleset",
		"a family's rules":          "flush table ip kube2iam-cni",
		"one chain":                 "flush chain ip6 kube2iam-cni guard",
		"a chain that is missing":   "delete chain ip kube2iam-cni guard",
		"a rule above the guard":    "insert rule ip kube2iam-cni guard accept",
		"the bridge's":              "flush table bridge kube2iam-cni",
		"the service":               "flush set ip kube2iam-cni metadata",
		"the service of the bridge": "flush set bridge kube2iam-cni metadata6",
	} {
		t.Run(name, func(t *testing.T) {
			n := newNamespace(t)
			n.must(n.nftables().Add(t.Context(), baseDual, first))
			n.run("nft " + damage)
			n.forget()
			n.transactions("ADD", 1, func() { n.must(n.nftables().Add(t.Context(), baseDual, second)) })
			n.wantRuleset("after ADD", want)
		})
	}
}
