// Package kubeapi is a fake Kubernetes API server for client-go: pods and namespaces with get, list
// and watch by the real protocol over a real socket, and Events.
//
// It lacks every other resource, writing pods over HTTP, protobuf and tables (406), and chunked
// lists (it ignores a limit, as the API allows).
package kubeapi

import (
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"maps"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/endpoint"
)

const (
	pods       = "pods"
	namespaces = "namespaces"
	events     = "events"
)

// Options of a Server. The zero value serves plain HTTP on a free port of the loopback interface,
// without authentication.
type Options struct {
	Address string          // host:port
	Listen  endpoint.Listen // nil is net.Listen
	TLS     bool            // with a certificate of its own: see CA
	Token   string          // the bearer token that every request must have
}

// Server is the API server. It is safe for concurrent use.
type Server struct {
	store    *store
	endpoint *endpoint.Endpoint
	token    string
	ca       []byte

	dropWatches, bookmark broadcast

	mu     sync.Mutex
	fault  Fault
	counts map[Request]int
	events []corev1.Event
}

// Request is a kind of request by Kubernetes' names: verb "get", "list", "watch", "create" or
// "patch".
type Request struct{ Verb, Resource string }

// Start serves until Close. The server has no pods, and the namespace "default".
func Start(o Options) (*Server, error) {
	s := &Server{store: newStore(), token: o.Token, counts: map[Request]int{}}
	if o.Address == "" {
		o.Address = "127.0.0.1:0"
	}
	var tlsConfig *tls.Config
	if o.TLS {
		cert, err := selfSigned(o.Address)
		if err != nil {
			return nil, fmt.Errorf("stand-in API server: %w", err)
		}
		tlsConfig = &tls.Config{Certificates: []tls.Certificate{cert}}
		s.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	}
	s.PutNamespace("default", nil)
	e, err := endpoint.Serve(o.Listen, o.Address, s.handler(), tlsConfig)
	if err != nil {
		return nil, fmt.Errorf("stand-in API server: %w", err)
	}
	s.endpoint = e
	return s, nil
}

// URL returns the server's address, as --api-server takes it.
func (s *Server) URL() string { return s.endpoint.URL() }

// CA returns the certificate that signed the server's, in PEM, or nil without TLS.
func (s *Server) CA() []byte { return s.ca }

// Close cuts every connection and stops the server.
func (s *Server) Close() { s.endpoint.Down() }

// PutPod creates or replaces a pod, and creates its namespace if it does not exist. It sets an
// empty UID or creation time. A pod with another UID is another pod: watchers see the deletion of
// the first. It returns a copy of the stored pod.
func (s *Server) PutPod(pod *corev1.Pod) *corev1.Pod {
	if _, ok := s.store.get(namespaces, "", pod.Namespace); !ok {
		s.PutNamespace(pod.Namespace, nil)
	}
	pod = pod.DeepCopy()
	pod.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	return s.store.put(pods, pod).(*corev1.Pod).DeepCopy()
}

// UpdatePod changes a pod that exists.
func (s *Server) UpdatePod(namespace, name string, change func(*corev1.Pod)) error {
	if s.store.update(pods, namespace, name, func(o object) { change(o.(*corev1.Pod)) }) == nil {
		return fmt.Errorf("pod %s/%s: not found", namespace, name)
	}
	return nil
}

// SetStatus sets a pod's phase and its addresses, the primary one first.
func (s *Server) SetStatus(namespace, name string, phase corev1.PodPhase, ips ...string) error {
	return s.UpdatePod(namespace, name, func(p *corev1.Pod) { setStatus(p, phase, ips) })
}

// DeletePod removes a pod that exists.
func (s *Server) DeletePod(namespace, name string) error {
	if !s.store.remove(pods, namespace, name) {
		return fmt.Errorf("pod %s/%s: not found", namespace, name)
	}
	return nil
}

// PutNamespace creates a namespace or replaces its annotations.
func (s *Server) PutNamespace(name string, annotations map[string]string) {
	replaced := s.store.update(namespaces, "", name, func(o object) { o.SetAnnotations(maps.Clone(annotations)) })
	if replaced != nil {
		return
	}
	s.store.put(namespaces, &corev1.Namespace{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{
			Name:        name,
			Labels:      map[string]string{"kubernetes.io/metadata.name": name},
			Annotations: maps.Clone(annotations),
		},
		Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive},
	})
}

// Events returns the Events in the order of their creation, each with its patches.
func (s *Server) Events() []corev1.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []corev1.Event
	for i := range s.events {
		all = append(all, *s.events[i].DeepCopy())
	}
	return all
}

// Requests counts the requests that arrived, including those that a fault refused.
func (s *Server) Requests() map[Request]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.counts)
}

func (s *Server) count(verb, resource string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[Request{Verb: verb, Resource: resource}]++
}
