// Package asker is a client of the metadata service that never retries, so that a caller sees every
// failed request.
package asker

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Asker makes requests as an SDK does, with one try of one second each. It is not safe for
// concurrent use.
type Asker struct {
	// Dial connects to the service.
	Dial func() (net.Conn, error)
	// Keep makes the Asker use a connection for several requests, until the server closes it.
	Keep bool

	conn net.Conn
	in   *bufio.Reader
}

// Get makes one request. Any status but 200 is an error.
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

// Close closes the current connection.
func (a *Asker) Close() {
	if a.conn != nil {
		a.conn.Close()
		a.conn = nil
	}
}
