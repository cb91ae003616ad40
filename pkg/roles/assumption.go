// Package roles turns the annotations of a pod and its namespace into the role that the pod may have, or into the reason
// why it has none.
package roles

import "time"

// Assumption is everything that goes into one AssumeRole call. It is comparable, and it is the key that credentials are
// kept under: two pods share credentials only where STS could not tell their calls apart.
type Assumption struct {
	// RoleARN is the full ARN of the role.
	RoleARN string
	// SessionName is the role session name, 2 to 64 bytes.
	SessionName string
	// ExternalID is what the role's trust policy may ask for; empty for none.
	ExternalID string
	// SourceIdentity is who CloudTrail names as the origin of all that the session does, 2 to 64 bytes; empty for none.
	SourceIdentity string
	// SessionPolicy is JSON that the session may do no more than, compact and of at most 2,048 characters; empty for none.
	SessionPolicy string
	// Tags are the session's.
	Tags Tags
	// Duration is how long the session lasts.
	Duration time.Duration
}

// RoleName is the bare name of the role, without its path: what the metadata service calls it.
func (a Assumption) RoleName() string { return roleName(a.RoleARN) }

// Tags are session tags by the keys that EKS Pod Identity uses, so that policies carry over. Empty ones are not sent.
// https://docs.aws.amazon.com/eks/latest/userguide/pod-id-abac.html
type Tags struct {
	ClusterARN, ClusterName, Namespace, ServiceAccount, PodName, PodUID string
}

// Each calls f with the key and the value of each tag that is set, always in the same order.
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
