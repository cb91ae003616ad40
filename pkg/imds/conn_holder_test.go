package imds

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// holding is a Holder that a test changes.
type holding struct{ atomic.Value }

func heldBy(holder string) *holding {
	h := new(holding)
	h.Store(holder)
	return h
}

func (h *holding) holder(netip.Addr) string { return h.Load().(string) }

// dialed is a connection to a server that a test made.
type dialed struct {
	*testing.T
	net.Conn
}

func dial(t *testing.T, address string) *dialed {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return &dialed{t, c}
}

func (d *dialed) ask() {
	d.Helper()
	if _, err := io.WriteString(d, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
		d.Fatal(err)
	}
}

// wantAnswer reads one answer of three bytes.
func (d *dialed) wantAnswer() {
	d.Helper()
	answer := make([]byte, 0, 1024)
	for !strings.HasSuffix(string(answer), "\r\n\r\nyes") {
		n, err := d.Read(answer[len(answer):cap(answer)])
		if err != nil {
			d.Fatalf("%q, %v, want an answer", answer, err)
		}
		answer = answer[:len(answer)+n]
	}
}

// wantReset wants the connection to end without one more byte.
func (d *dialed) wantReset(when string) {
	d.Helper()
	if answer, err := io.ReadAll(d); len(answer) > 0 || !errors.Is(err, unix.ECONNRESET) {
		d.Errorf("%s: %q, %v, want a reset and nothing else", when, answer, err)
	}
}

// TestAnotherHolderIsNotAnswered has the holder of a connection's address change before an answer is written, in each way in
// which net/http writes one. The sweep does not come in this test.
func TestAnotherHolderIsNotAnswered(t *testing.T) {
	for name, write := range map[string]func(w http.ResponseWriter){
		"write":          func(w http.ResponseWriter) { io.WriteString(w, "yes") },
		"nothing":        func(w http.ResponseWriter) { w.WriteHeader(http.StatusNoContent) },
		"more than fits": func(w http.ResponseWriter) { io.WriteString(w, strings.Repeat("no", 16<<10)) },
	} {
		t.Run(name, func(t *testing.T) {
			held := heldBy("A")
			asked := make(chan string, 1)
			address, _, refused := limitedFor(t, held.holder, time.Hour, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Length", "3")
				select {
				case next := <-asked:
					held.Store(next)
					w.Header().Del("Content-Length")
					write(w)
				default:
					io.WriteString(w, "yes")
				}
			})
			c := dial(t, address)
			c.ask()
			c.wantAnswer()
			c.ask()
			c.wantAnswer()
			asked <- "B"
			c.ask()
			c.wantReset("an answer to A's connection while B holds the address")

			c = dial(t, address)
			c.ask()
			c.wantAnswer()
			asked <- ""
			c.ask()
			c.wantReset("an answer to B's connection while nobody holds the address")
			if n := refused.Load(); n != 2 {
				t.Errorf("%d resets were counted, want 2", n)
			}
		})
	}
}

// TestReadFromAsksWhoHoldsTheAddress has the holder change in the midst of an answer that net/http hands to the connection's
// ReadFrom, past its Write.
func TestReadFromAsksWhoHoldsTheAddress(t *testing.T) {
	const sniffed = 512 // what net/http writes by itself before
	held := heldBy("A")
	address, _, refused := limitedFor(t, held.holder, time.Hour, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(sniffed+len("secret")))
		secret := readerFunc(func(b []byte) (int, error) {
			held.Store("B")
			return copy(b, "secret"), io.EOF
		})
		w.(io.ReaderFrom).ReadFrom(io.MultiReader(strings.NewReader(strings.Repeat("-", sniffed)), secret))
	})
	c := dial(t, address)
	c.ask()
	if answer, err := io.ReadAll(c); strings.Contains(string(answer), "secret") || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%q, %v, want a reset before the secret", answer, err)
	}
	if n := refused.Load(); n != 1 {
		t.Errorf("%d resets were counted, want 1", n)
	}
}

type readerFunc func(b []byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// TestHolderThatBecomesKnown holds that a connection whose holder was not known is served to the first holder that is known,
// and to no other.
func TestHolderThatBecomesKnown(t *testing.T) {
	held := heldBy("")
	address, _, refused := limitedFor(t, held.holder, time.Hour, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "yes") })
	c := dial(t, address)
	for _, holder := range []string{"", "", "A", "A"} {
		held.Store(holder)
		c.ask()
		c.wantAnswer()
	}
	held.Store("B")
	c.ask()
	c.wantReset("B's request on A's connection")
	if n := refused.Load(); n != 1 {
		t.Errorf("%d resets were counted, want 1", n)
	}
}

// TestSweepResetsConnectionsOfAnotherHolder has connections rest while the holder of their address changes.
func TestSweepResetsConnectionsOfAnotherHolder(t *testing.T) {
	held := heldBy("A")
	answer := make(chan struct{})
	address, _, refused := limitedFor(t, held.holder, 10*time.Millisecond, func(w http.ResponseWriter, _ *http.Request) { <-answer })
	defer close(answer)
	silent, waiting := dial(t, address), dial(t, address)
	waiting.ask()
	answer <- struct{}{} // the first answer is written, so the connection was accepted
	waiting.wantStatusOK()
	waiting.ask()
	held.Store("B")
	silent.wantReset("a connection on which nothing was sent")
	waiting.wantReset("a connection that waits for its answer")
	if n := refused.Load(); n != 2 {
		t.Errorf("%d resets were counted, want 2", n)
	}
}

func (d *dialed) wantStatusOK() {
	d.Helper()
	answer := make([]byte, 1024)
	if n, err := d.Read(answer); err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 200") {
		d.Fatalf("%q, %v", answer[:n], err)
	}
}

// TestUnacknowledgedAnswersEnd holds that the kernel is told how long an answer may be unacknowledged.
func TestUnacknowledgedAnswersEnd(t *testing.T) {
	set := make(chan int, 1)
	address, _ := limited(t, func(w http.ResponseWriter, r *http.Request) {
		c := r.Context().Value(connKey{}).(*conn)
		raw, err := c.SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		raw.Control(func(fd uintptr) {
			ms, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
			if err != nil {
				t.Error(err)
			}
			set <- ms
		})
	})
	dial(t, address).ask()
	if ms := <-set; ms != 1000 {
		t.Errorf("TCP_USER_TIMEOUT is %d ms, want the second that SDKs wait", ms)
	}
}
