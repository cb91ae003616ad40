// Package metrics provides the proxy's Prometheus metrics. Those that kube2iam has as well keep its
// names.
package metrics

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const namespace = "kube2iam"

// Metrics are the proxy's metrics. No label has a value that a pod chooses.
type Metrics struct {
	registry *prometheus.Registry
	assumed  *prometheus.HistogramVec
	hits     prometheus.Counter
	misses   prometheus.Counter
	refused  prometheus.Counter
	refusals *prometheus.CounterVec
	delayed  prometheus.Counter
}

// New returns metrics in a registry of their own. Each scrape calls pods and isReady.
func New(version, commit, date string, pods func() int, isReady func() bool) *Metrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	register := promauto.With(registry)
	register.NewGauge(prometheus.GaugeOpts{
		Namespace: namespace, Name: "info", Help: "Always 1; the labels tell which build runs.",
		ConstLabels: prometheus.Labels{"version": version, "commit_hash": commit, "build_date": date},
	}).Set(1)
	register.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: namespace, Name: "pods", Help: "Pods of this node that are known.",
	}, func() float64 { return float64(pods()) })
	register.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: namespace, Name: "healthcheck_status", Help: "1 while /healthz says that the proxy is ready.",
	}, func() float64 {
		if isReady() {
			return 1
		}
		return 0
	})
	return &Metrics{
		registry: registry,
		assumed: register.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: "iam", Name: "request_duration_seconds",
			Help:    "How long calls of AssumeRole took, by their outcome.",
			Buckets: []float64{.025, .05, .1, .2, .4, .8, 1.6, 3.2, 6.4, 12.8},
		}, []string{"code"}),
		hits: register.NewCounter(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: "iam", Name: "cache_hits_total",
			Help: "Requests for credentials that were answered without waiting for STS.",
		}),
		misses: register.NewCounter(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: "iam", Name: "cache_misses_total",
			Help: "Requests for credentials that waited for STS.",
		}),
		refused: register.NewCounter(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: "http", Name: "connections_refused_total",
			Help: "Connections that were reset or closed: no rule of this node had redirected them, their pod or all pods had too many, their pod makes too many requests, or another pod holds their address now.",
		}),
		refusals: register.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: "http", Name: "refusals_total",
			Help: "Requests of pods that were refused, by the status of the answer.",
		}, []string{"status"}),
		delayed: register.NewCounter(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: "http", Name: "requests_delayed_total",
			Help: "Requests of pods that waited because their pod makes more than it may.",
		}),
	}
}

// Handler serves the registry.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second})
}

// Assumed implements credentials.Observer.
func (m *Metrics) Assumed(outcome string, took time.Duration) {
	m.assumed.WithLabelValues(outcome).Observe(took.Seconds())
}

// Requested implements credentials.Observer.
func (m *Metrics) Requested(hit bool) {
	if hit {
		m.hits.Inc()
		return
	}
	m.misses.Inc()
}

// Refused counts a request that was refused with a status, of which there are a handful.
func (m *Metrics) Refused(status int) { m.refusals.WithLabelValues(strconv.Itoa(status)).Inc() }

// RequestDelayed counts a request that waited because its pod makes too many.
func (m *Metrics) RequestDelayed() { m.delayed.Inc() }

// ConnectionRefused counts a connection that was refused, reset, or closed in favour of another
// pod's.
func (m *Metrics) ConnectionRefused() { m.refused.Inc() }
