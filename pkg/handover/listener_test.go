package handover

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// TestListenWithoutMPTCP has a client ask for MPTCP. It is served by TCP, whose socket options the
// proxy needs.
func TestListenWithoutMPTCP(t *testing.T) {
	l, err := Socket{Address: "127.0.0.1:0"}.Listen(t.Context(), false)
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

// TestOnlyASuccessorSharesAPort has another process that is no successor listen on the port: two
// proxies with other state directories do not find each other.
func TestOnlyASuccessorSharesAPort(t *testing.T) {
	first, err := Socket{Address: "127.0.0.1:0", ReusePort: true}.Listen(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	_, port, _ := net.SplitHostPort(first.Addr().String())
	for _, address := range []string{"127.0.0.1:" + port, ":" + port} {
		if l, err := (Socket{Address: address, ReusePort: true}).Listen(t.Context(), false); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("another process listens on %s: %v, %v", address, l, err)
		}
	}
	successor, err := Socket{Address: ":" + port, ReusePort: true}.Listen(t.Context(), true)
	if err != nil {
		t.Fatalf("a successor: %v", err)
	}
	defer successor.Close()
	if l, err := (Socket{Address: ":" + port, ReusePort: true}).Listen(t.Context(), false); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("another process after the successor: %v, %v", l, err)
	}
}
