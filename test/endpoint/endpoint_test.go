package endpoint

import (
	"errors"
	"io"
	"net/http"
	"syscall"
	"testing"
)

func TestDownAndUpAtOneAddress(t *testing.T) {
	hold := make(chan struct{})
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stream" {
			http.NewResponseController(w).Flush()
			select {
			case <-hold:
			case <-r.Context().Done():
			}
		}
	})
	e, err := Serve(nil, "127.0.0.1:0", handler, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Down()
	address := e.Addr()

	stream, err := http.Get(e.URL() + "/stream")
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Body.Close()
	e.Down()
	e.Down()
	if _, err := io.ReadAll(stream.Body); err == nil {
		t.Error("an open stream ended in order when the endpoint went down")
	}
	if _, err := http.Get(e.URL()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("while down: %v, want a refused connection", err)
	}

	for range 2 {
		if err := e.Up(); err != nil {
			t.Fatal(err)
		}
	}
	if e.Addr() != address {
		t.Errorf("back at %s, want %s", e.Addr(), address)
	}
	resp, err := http.Get(e.URL())
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}
