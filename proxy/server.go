package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
)

// podServer returns the server for pods. It bounds what a client sends. The imds.Listener bounds
// how long an answer may stay unacknowledged.
func podServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:        h,
		ConnContext:    imds.ConnContext,
		ReadTimeout:    5 * time.Second, // no ReadHeaderTimeout: a second deadline costs time on each request
		IdleTimeout:    2 * time.Minute,
		MaxHeaderBytes: 4 << 10,
		// The handler answers OPTIONS * like any other request.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// boundedServer returns a server with bounded reads, writes and headers.
func boundedServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// serveHTTP serves until ctx ends. Then it calls drain, which may be nil, and shuts down within
// five seconds.
func serveHTTP(ctx context.Context, s *http.Server, l net.Listener, drain func()) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		if drain != nil {
			drain()
		}
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if s.Shutdown(grace) != nil {
			s.Close()
		}
	})
	err := s.Serve(l)
	if errors.Is(err, http.ErrServerClosed) {
		<-stopped
		return nil
	}
	stop()
	return err
}
