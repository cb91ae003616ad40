package main

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/broker"
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
			enc.Encode(p.store())
		})
	}
	return boundedServer(mux, log)
}

// storeEntry is a line of /debug/store.
type storeEntry struct {
	broker.Assignment
	// STSError is the error of the last call to STS for the role.
	STSError string `json:"stsError,omitempty"`
	// WithoutRecord is the addresses of the pod that no record says are its own.
	WithoutRecord []netip.Addr `json:"withoutRecord,omitempty"`
	// Ambiguous is the addresses of the pod that another running pod of the node reports, too.
	Ambiguous []netip.Addr `json:"ambiguous,omitempty"`
}

// store returns which pod may assume which role, in the order of their names, and what keeps it from its credentials.
func (p *parts) store() []storeEntry {
	entries := []storeEntry{}
	assignments := p.broker.Assignments()
	reporting := make(map[netip.Addr]int)
	for _, a := range assignments {
		for _, ip := range a.IPs {
			reporting[ip]++
		}
	}
	for _, a := range assignments {
		e := storeEntry{Assignment: a}
		if a.Reason == "" {
			if failure := p.cache.Failure(a.Assumption); failure != nil {
				e.STSError = failure.Error()
			}
		}
		for _, ip := range a.IPs {
			if r, err := p.records.Holder(ip); err != nil || r == nil || !names(r.Pod, a) {
				e.WithoutRecord = append(e.WithoutRecord, ip)
			}
			if reporting[ip] > 1 {
				e.Ambiguous = append(e.Ambiguous, ip)
			}
		}
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b storeEntry) int { return strings.Compare(a.Pod, b.Pod) })
	return entries
}

// names tells whether a record's pod is the one of the assignment, by its UID or, where an old
// runtime gave the record none, by its name.
func names(p attachment.Pod, a broker.Assignment) bool {
	uid := types.UID(p.UID)
	return p.Namespace+"/"+p.Name == a.Pod && (uid == "" || uid == a.UID || uid == a.Mirror)
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
