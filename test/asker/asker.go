// Package asker is a client of the metadata service that never tries again: whatever a server does to a request, it tells.
package asker

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Asker makes requests as an SDK does, with one try of one second each. It is not for concurrent use.
type Asker struct {
	// Dial connects to the service.
	Dial func() (net.Conn, error)
	// Keep has a connection used for more than one request, until the server says that it closes it.
	Keep bool

	conn net.Conn
	in   *bufio.Reader
}

// Get makes one request, whose answer must be 200.
func (a *Asker) Get(path string) (body string, err error) {
	if a.conn == nil {
		if a.conn, err = a.Dial(); err != nil {
			return "", fmt.Errorf("dial: %w", err)
		}
		a.in = bufio.NewReader(a.conn)
	}
	a.conn.SetDeadline(time.Now().Add(time.Second))
	closing := ""
	if !a.Keep {
		closing = "Connection: close\r\n"
	}
	if _, err := io.WriteString(a.conn, "GET "+path+" HTTP/1.1\r\nHost: 169.254.169.254\r\n"+closing+"\r\n"); err != nil {
		return "", err
	}
	res, err := http.ReadResponse(a.in, nil)
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return "", err
	}
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %q", res.Status, text)
	}
	if res.Close || !a.Keep {
		a.conn.Close()
		a.conn = nil
	}
	return string(text), nil
}

// Close closes the connection that it has.
func (a *Asker) Close() {
	if a.conn != nil {
		a.conn.Close()
		a.conn = nil
	}
}
