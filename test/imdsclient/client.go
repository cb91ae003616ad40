// Package imdsclient is a client of the metadata service that never retries, so that a caller sees
// every failed request.
package imdsclient

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Client makes requests as an SDK does, with one try of one second each. It is not safe for
// concurrent use.
type Client struct {
	// Dial connects to the service.
	Dial func() (net.Conn, error)
	// Keep makes the Client use a connection for several requests, until the server closes it.
	Keep bool

	conn net.Conn
	in   *bufio.Reader
}

// Get makes one request. Any status but 200 is an error.
func (c *Client) Get(path string) (body string, err error) {
	if c.conn == nil {
		if c.conn, err = c.Dial(); err != nil {
			return "", fmt.Errorf("dial: %w", err)
		}
		c.in = bufio.NewReader(c.conn)
	}
	c.conn.SetDeadline(time.Now().Add(time.Second))
	closing := ""
	if !c.Keep {
		closing = "Connection: close\r\n"
	}
	if _, err := io.WriteString(c.conn, "GET "+path+" HTTP/1.1\r\nHost: 169.254.169.254\r\n"+closing+"\r\n"); err != nil {
		return "", err
	}
	res, err := http.ReadResponse(c.in, nil)
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
	if res.Close || !c.Keep {
		c.conn.Close()
		c.conn = nil
	}
	return string(text), nil
}

// Close closes the current connection.
func (c *Client) Close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}
