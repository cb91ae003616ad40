// Package endpoint serves HTTP at an address that can go down and come back up.
package endpoint

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
)

// Listen opens a listener, as net.Listen does. It chooses the network namespace.
type Listen func(network, address string) (net.Listener, error)

// Endpoint serves a handler at one address.
type Endpoint struct {
	handler http.Handler
	listen  Listen
	tls     *tls.Config

	mu      sync.Mutex
	address string
	server  *http.Server
	served  chan struct{}
}

// Serve serves the handler at address, host:port, over TLS if tlsConfig is not nil. For port 0 it
// chooses a free port and keeps it. A nil listen is net.Listen.
func Serve(listen Listen, address string, handler http.Handler, tlsConfig *tls.Config) (*Endpoint, error) {
	if listen == nil {
		listen = net.Listen
	}
	e := &Endpoint{handler: handler, listen: listen, tls: tlsConfig, address: address}
	return e, e.Up()
}

// Up serves again at the same address. It does nothing if the endpoint is up.
func (e *Endpoint) Up() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.server != nil {
		return nil
	}
	l, err := e.listen("tcp", e.address)
	if err != nil {
		return fmt.Errorf("serve %s: %w", e.address, err)
	}
	e.address = l.Addr().String()
	server := &http.Server{Handler: e.handler, TLSConfig: e.tls}
	served := make(chan struct{})
	e.server, e.served = server, served
	go func() {
		defer close(served)
		var err error
		if e.tls != nil {
			err = server.ServeTLS(l, "", "")
		} else {
			err = server.Serve(l)
		}
		if !errors.Is(err, http.ErrServerClosed) {
			panic(fmt.Sprintf("serve %s: %v", l.Addr(), err))
		}
	}()
	return nil
}

// Down closes every connection. The kernel refuses new ones, and the address stays reserved.
func (e *Endpoint) Down() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.server == nil {
		return
	}
	e.server.Close()
	<-e.served
	e.server = nil
}

// Addr returns the address, host:port.
func (e *Endpoint) Addr() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.address
}

// URL returns the URL without a path.
func (e *Endpoint) URL() string {
	if e.tls != nil {
		return "https://" + e.Addr()
	}
	return "http://" + e.Addr()
}
