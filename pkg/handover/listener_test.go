package handover

import (
	"net"
	"testing"
)

// TestListenWithoutMPTCP has a client ask for MPTCP. It is served by TCP, whose socket options the
// proxy needs.
func TestListenWithoutMPTCP(t *testing.T) {
	l, err := Socket{Address: "127.0.0.1:0"}.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var d net.Dialer
	d.SetMultipathTCP(true)
	client, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if multipath, err := c.(*net.TCPConn).MultipathTCP(); multipath || err != nil {
		t.Errorf("MPTCP: %t, %v", multipath, err)
	}
}
