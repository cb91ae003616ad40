package handover

import (
	"errors"
	"io"
	"net"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/unixsocket"
)

func TestDialReturnsNilIfNoProcessServes(t *testing.T) {
	path := socketPath(t)
	if p, err := Dial(t.Context(), path); p != nil || err != nil {
		t.Errorf("no socket: %v, %v", p, err)
	}
	start(t, path, "ended").end()
	if p, err := Dial(t.Context(), path); p != nil || err != nil {
		t.Errorf("its process has ended: %v, %v", p, err)
	}
}

// TestMalformedRepliesAreRefused has a process at the path that is no proxy.
func TestMalformedRepliesAreRefused(t *testing.T) {
	for name, reply := range map[string]string{
		"none":            "",
		"another request": "c",
		"no JSON":         "o{",
		"no sockets":      `o{"Sockets":[]}`,
		"only a name":     `o{"Sockets":["a"]}`,
	} {
		t.Run(name, func(t *testing.T) {
			path := socketPath(t)
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := l.Accept()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				defer conn.Close()
				conn.Read(make([]byte, 1))
				io.WriteString(conn, reply)
			}()
			if p, err := Dial(t.Context(), path); p != nil || err == nil {
				t.Errorf("%v, %v", p, err)
			}
		})
	}
}

func TestOfferIsBounded(t *testing.T) {
	path := socketPath(t)
	start(t, path, "old")
	for limit, want := range map[int64]error{maxOffer: nil, 10: io.ErrUnexpectedEOF} {
		c, err := unixsocket.Dial(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		p := &Predecessor{conn: c}
		if err := p.receive(limit); !errors.Is(err, want) {
			t.Errorf("at most %d bytes: %v, want %v", limit, err, want)
		}
		p.Close()
	}
}
