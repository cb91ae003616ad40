package hostlink

import "testing"

func TestForwards(t *testing.T) {
	n := newNode(t)
	for family, sysctl := range map[Family]string{IPv4: "net/ipv4/ip_forward", IPv6: "net/ipv6/conf/all/forwarding"} {
		for _, value := range []string{"0", "1", "0"} {
			n.sysctl(sysctl, value)
			if got, want := Forwards(family), value == "1"; got != want {
				t.Errorf("%s is %s: got %v", sysctl, value, got)
			}
		}
	}
	if on("/proc/sys/net/ipv6/conf/none/forwarding") {
		t.Error("a switch that does not exist is on")
	}
}
