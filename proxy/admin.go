package main

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/broker"
)

// adminServer returns the server of the metrics port. Pods are not redirected to it, but can dial
// it.
func adminServer(c *components, o *options, log *slog.Logger) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", c.serveHealth)
	mux.Handle("GET /metrics", c.metrics.Handler())
	if o.debug {
		mux.HandleFunc("GET /debug/store", func(w http.ResponseWriter, r *http.Request) {
			// A pod must not see the roles of other pods.
			if client, err := netip.ParseAddrPort(r.RemoteAddr); err != nil || !client.Addr().Unmap().IsLoopback() {
				http.NotFound(w, r)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			enc := json.NewEncoder(w)
			enc.SetIndent("", "  ")
			enc.Encode(c.store())
		})
	}
	return boundedServer(mux, log)
}

// serveHealth answers with 200 once the pods of this node are known, and with 503 before.
func (c *components) serveHealth(w http.ResponseWriter, _ *http.Request) {
	if !c.isReady() {
		http.Error(w, "the API server has not listed the pods of this node yet", http.StatusServiceUnavailable)
		return
	}
	io.WriteString(w, "ok\n")
}

// storeEntry is an element of /debug/store.
type storeEntry struct {
	broker.Assignment
	// STSError is the error of the last call of STS for the role.
	STSError string `json:"stsError,omitempty"`
	// WithoutRecord are the addresses of the pod for which no record names it.
	WithoutRecord []netip.Addr `json:"withoutRecord,omitempty"`
	// Ambiguous are the addresses of the pod that another running pod of the node reports as well.
	Ambiguous []netip.Addr `json:"ambiguous,omitempty"`
}

// store returns the role of each pod and the reasons why it has no credentials, sorted by pod.
func (c *components) store() []storeEntry {
	entries := []storeEntry{}
	assignments := c.broker.Assignments()
	reports := make(map[netip.Addr]int)
	for _, a := range assignments {
		for _, ip := range a.IPs {
			reports[ip]++
		}
	}
	for _, a := range assignments {
		e := storeEntry{Assignment: a}
		if a.Reason == "" {
			if err := c.cache.Failure(a.Assumption); err != nil {
				e.STSError = err.Error()
			}
		}
		for _, ip := range a.IPs {
			if r, err := c.records.Holder(ip); err != nil || r == nil || !isPodOf(r.Pod, a) {
				e.WithoutRecord = append(e.WithoutRecord, ip)
			}
			if reports[ip] > 1 {
				e.Ambiguous = append(e.Ambiguous, ip)
			}
		}
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b storeEntry) int { return strings.Compare(a.Pod, b.Pod) })
	return entries
}

// isPodOf reports whether a record's pod is the assignment's. Old runtimes pass no UID to the
// plugin.
func isPodOf(p attachment.Pod, a broker.Assignment) bool {
	uid := types.UID(p.UID)
	return p.Namespace+"/"+p.Name == a.Pod && (uid == "" || uid == a.UID || uid == a.Mirror)
}
