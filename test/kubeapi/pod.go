package kubeapi

import (
	"maps"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
)

// NewPod returns a pod that the scheduler has assigned to the node and the kubelet has not started:
// Pending, without an address.
func NewPod(node, namespace, name string, annotations map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:   namespace,
			Name:        name,
			UID:         uuid.NewUUID(),
			Annotations: maps.Clone(annotations),
		},
		Spec: corev1.PodSpec{
			NodeName:           node,
			ServiceAccountName: "default",
			RestartPolicy:      corev1.RestartPolicyAlways,
			Containers:         []corev1.Container{{Name: "main", Image: "example.org/main:1"}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodPending},
	}
}

// NewRunningPod returns a pod that runs on the node with these addresses.
func NewRunningPod(node, namespace, name string, annotations map[string]string, ips ...string) *corev1.Pod {
	pod := NewPod(node, namespace, name, annotations)
	setStatus(pod, corev1.PodRunning, ips)
	return pod
}

func setStatus(pod *corev1.Pod, phase corev1.PodPhase, ips []string) {
	pod.Status.Phase = phase
	pod.Status.PodIP, pod.Status.PodIPs = "", nil
	for i, ip := range ips {
		if i == 0 {
			pod.Status.PodIP = ip
		}
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: ip})
	}
}
