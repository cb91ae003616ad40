// Package pods finds the pod that a source address belongs to: by the attachment records first, then by what the Kubernetes
// API reports. What is ambiguous is refused.
package pods

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Pod is what the proxy needs to know of a pod. It is never changed once made, so it is shared freely.
type Pod struct {
	// ObjectMeta holds namespace, name, UID, annotations and resource version, and nothing else; it is what makes a Pod
	// an object that client-go can store.
	metav1.ObjectMeta

	// Node is the node that the pod is bound to.
	Node string
	// ServiceAccount is the name of the pod's service account.
	ServiceAccount string
	// IPs are those of status.podIPs; none for a pod on the host's network, whose addresses are the node's.
	IPs []netip.Addr
	// HostNetwork tells that the pod shares the node's network.
	HostNetwork bool
	// Mirror is the UID that the kubelet gave to a static pod, of which this one is the API's mirror; empty for any other.
	// It is the UID that the runtime is told, and so the one in the attachment record.
	Mirror types.UID
	// Deleting tells that it is being deleted: its containers may have ended, and its address may have gone on.
	Deleting bool
	// Finished tells that its containers have ended for good: its address may be another's by now.
	Finished bool
}

// String is the pod's name in logs, "<namespace>/<name>".
func (p *Pod) String() string { return p.Namespace + "/" + p.Name }

// fromAPI makes a Pod of the API's object and keeps only the annotations that are asked for.
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
	add := func(s string) {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			return
		}
		if ip = ip.Unmap().WithZone(""); !slices.Contains(pod.IPs, ip) {
			pod.IPs = append(pod.IPs, ip)
		}
	}
	for _, ip := range p.Status.PodIPs {
		add(ip.IP)
	}
	add(p.Status.PodIP) // API servers before 1.16 set this one only
	return pod
}
