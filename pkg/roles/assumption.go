// Package roles derives the role of a pod from the annotations of the pod and of its namespace.
package roles

import (
	"strings"
	"time"
)

// Assumption holds all parameters of one AssumeRole call. It is comparable, and is the key of the
// credentials cache: pods share credentials only if their calls would be identical.
type Assumption struct {
	RoleARN string
	// SessionName is the role session name, 2 to 64 bytes.
	SessionName string
	// ExternalID is an ID that the role's trust policy may require; empty for none.
	ExternalID string
	// SourceIdentity is the identity that CloudTrail records for all actions of the session, 2 to
	// 64 bytes; empty for none.
	SourceIdentity string
	// SessionPolicy is a policy in compact JSON that narrows the session's permissions; empty for
	// none.
	SessionPolicy string
	Tags          Tags
	// Duration is the length of the session.
	Duration time.Duration
}

// RoleName returns the role's name without its path, as the metadata service lists it.
func (a Assumption) RoleName() string { return a.RoleARN[strings.LastIndexByte(a.RoleARN, '/')+1:] }

// Tags are session tags. Their keys are those of EKS Pod Identity, so policies for EKS Pod Identity
// also work here. Empty tags are not sent.
// https://docs.aws.amazon.com/eks/latest/userguide/pod-id-abac.html
type Tags struct {
	ClusterARN, ClusterName, Namespace, ServiceAccount, PodName, PodUID string
}

// Each calls f with the key and the value of each tag that is set, in a fixed order.
func (t Tags) Each(f func(key, value string)) {
	for _, tag := range [...][2]string{
		{"eks-cluster-arn", t.ClusterARN}, {"eks-cluster-name", t.ClusterName},
		{"kubernetes-namespace", t.Namespace}, {"kubernetes-service-account", t.ServiceAccount},
		{"kubernetes-pod-name", t.PodName}, {"kubernetes-pod-uid", t.PodUID},
	} {
		if tag[1] != "" {
			f(tag[0], tag[1])
		}
	}
}
