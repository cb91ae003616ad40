// Package pods finds the pod that holds a source address: first by the attachment records, then by
// status.podIPs in the Kubernetes API. It refuses ambiguous addresses.
package pods

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Pod holds the fields of a pod that the proxy needs. It is immutable, so goroutines share it.
type Pod struct {
	// ObjectMeta holds only namespace, name, UID, annotations and resource version. It makes a Pod an
	// object that client-go can store.
	metav1.ObjectMeta

	// Node is the name of the node that the pod is bound to.
	Node string
	// ServiceAccount is the name of the pod's service account.
	ServiceAccount string
	// IPs are those of status.podIPs. A pod on the host's network has none, because its addresses are
	// the node's.
	IPs []netip.Addr
	// HostNetwork is true if the pod shares the node's network.
	HostNetwork bool
	// Mirror is the UID that the kubelet gave to a static pod, if this is the mirror pod of one, or
	// empty. The runtime and thus the attachment record use this UID.
	Mirror types.UID
	// Deleting is true if the pod is being deleted. Another pod may hold its address already.
	Deleting bool
	// Finished is true if the pod succeeded or failed. Another pod may hold its address already.
	Finished bool
}

// String returns "<namespace>/<name>".
func (p *Pod) String() string { return p.Namespace + "/" + p.Name }

// fromAPI converts the API's object. It keeps the annotations for whose keys keep returns true.
func fromAPI(p *corev1.Pod, keep func(key string) bool) *Pod {
	pod := &Pod{
		ObjectMeta:     metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion},
		Node:           p.Spec.NodeName,
		HostNetwork:    p.Spec.HostNetwork,
		ServiceAccount: p.Spec.ServiceAccountName,
		Deleting:       p.DeletionTimestamp != nil,
		Finished:       p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
	}
	for k, v := range p.Annotations {
		if k == corev1.MirrorPodAnnotationKey {
			pod.Mirror = types.UID(v)
		}
		if keep(k) {
			if pod.Annotations == nil {
				pod.Annotations = make(map[string]string)
			}
			pod.Annotations[k] = v
		}
	}
	if pod.HostNetwork {
		return pod
	}
	// An object may have podIP without podIPs. Otherwise podIP is one of podIPs.
	for _, reported := range append(slices.Clip(p.Status.PodIPs), corev1.PodIP{IP: p.Status.PodIP}) {
		ip, err := netip.ParseAddr(reported.IP)
		if ip = ip.Unmap().WithZone(""); err == nil && !slices.Contains(pod.IPs, ip) {
			pod.IPs = append(pod.IPs, ip)
		}
	}
	return pod
}

// reportedIPs returns the pod's addresses as text. For a finished pod it returns none, because
// another pod may hold its addresses.
func (p *Pod) reportedIPs() []string {
	if p.Finished {
		return nil
	}
	ips := make([]string, len(p.IPs))
	for i, ip := range p.IPs {
		ips[i] = ip.String()
	}
	return ips
}
