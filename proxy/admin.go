package main

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"time"
)

// adminServer serves health and metrics to people and Prometheus, on a port that no pod is
// redirected to. Probes ask elsewhere: probe.go.
func adminServer(p *parts, o *options, log *slog.Logger) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", p.serveHealth)
	mux.Handle("GET /metrics", p.metrics.Handler())
	if o.debug {
		mux.HandleFunc("GET /debug/store", func(w http.ResponseWriter, r *http.Request) {
			// Pods can dial this port, and which pod has which role is not theirs to know.
			if from, err := netip.ParseAddrPort(r.RemoteAddr); err != nil || !from.Addr().Unmap().IsLoopback() {
				http.NotFound(w, r)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			enc := json.NewEncoder(w)
			enc.SetIndent("", "  ")
			enc.Encode(p.broker.Assignments())
		})
	}
	return boundedServer(mux, log)
}

// serveHealth answers with 200 once the pods of this node are known, and with 503 before.
func (p *parts) serveHealth(w http.ResponseWriter, _ *http.Request) {
	if !p.ready() {
		http.Error(w, "the API server has not listed the pods of this node yet", http.StatusServiceUnavailable)
		return
	}
	io.WriteString(w, "ok\n")
}

// boundedServer is a server whose reads, writes and headers are bounded.
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
