// Package endpoint serves HTTP at an address that can go down and come back up, as a real service's does.
package endpoint

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
)

// Listen opens a listener, as net.Listen does: in which network namespace is the function's own matter.
type Listen func(network, address string) (net.Listener, error)

// Endpoint is a handler that is served at one address.
type Endpoint struct {
	handler http.Handler
	listen  Listen
	tls     *tls.Config

	mu      sync.Mutex
	address string
	server  *http.Server
	served  chan struct{}
}

// Serve serves the handler at address, host:port, over TLS where tlsConfig is given. Port 0 takes a free port, and keeps
// it. A nil listen is net.Listen.
func Serve(listen Listen, address string, handler http.Handler, tlsConfig *tls.Config) (*Endpoint, error) {
	if listen == nil {
		listen = net.Listen
	}
	e := &Endpoint{handler: handler, listen: listen, tls: tlsConfig, address: address}
	return e, e.Up()
}

// Up serves again at the same address. It is no error when it already does.
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

// Down cuts every open connection, and the kernel refuses new ones from then on. The address stays the endpoint's.
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

// Addr is where it serves, host:port.
func (e *Endpoint) Addr() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.address
}

// URL is where it serves, without a path.
func (e *Endpoint) URL() string {
	if e.tls != nil {
		return "https://" + e.Addr()
	}
	return "http://" + e.Addr()
}
