// Package cluster is the suite that runs the plugin and the proxy on a real Kubernetes node, with real clients:
//
//	pod ── plugin's rules ── kube2iam-proxy ─┬─ API server             etcd, controller-manager, scheduler, kubelet, kube-proxy,
//	                                         │                         containerd and runc, in namespaces of their own (node/)
//	                                         ├─ STS and S3             MinIO
//	                                         └─ the metadata service   Amazon's own mock, every request to it recorded
//
// Metadata service, STS and S3 lie beyond the node, in a network that its default route leads to, as they do on EC2.
//
// MinIO is the judge of credentials. Its AssumeRole verifies the node's signature, and its S3 takes the temporary credentials
// and, by the policy that the suite gives the node's user, none but temporary ones. What it cannot judge is the role: it
// reads no RoleArn, trust policy, external ID or session tag, and what it vends has the rights of the user that asked, narrowed by a
// session policy where there is one. That the right role is asked for is shown where STS is a stand-in that records it
// (test/netns); here, the role's name is what the metadata protocol tells the pod.
//
// What is installed there is what operators install: the images by this repository's Dockerfiles, built by buildah, and conf/kustomize. Lines
// that begin with "figure" are figures, as `make bench` has them.
//
// The suite needs root and is not part of an ordinary `go test ./...`: scripts/test-cluster.sh builds what it needs and runs it
// with the build tag "cluster".
package cluster
