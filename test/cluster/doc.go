// Package cluster is the suite that runs the plugin, the agent and the proxy on a real Kubernetes
// node, with real clients:
//
//	pod ── plugin's rules ── kube2iam-proxy ─┬─ API server
//	                                         ├─ STS and S3             MinIO
//	                                         └─ the metadata service   Amazon's own mock
//
// The node (node/) is etcd, API server, controller-manager, scheduler, kubelet, kube-proxy,
// containerd and runc in namespaces of their own. Metadata service, STS and S3 are outside the
// node, behind its default route, as on EC2. A tap records every request to the metadata service.
//
// MinIO verifies credentials. Its AssumeRole verifies the node's signature. Its S3 accepts only
// temporary credentials, by the policy of the node's user. MinIO does not verify roles: it ignores
// RoleArn, trust policies, external IDs and session tags, and its credentials have the rights of
// the caller, narrowed by a session policy. test/netns verifies the requested role with a stand-in
// for STS; this suite verifies the role's name in the answers to the pod.
//
// The suite installs what operators install: images from this repository's Dockerfiles, built by
// buildah, and conf/kustomize. Its last part runs the commands of README.md and docs/. Output lines
// that begin with "figure" are figures, as in `make bench`.
//
// The suite needs root and is not part of `go test ./...`. scripts/test-cluster.sh builds what it
// needs and runs it with the build tag "cluster". The parts run in order on one node, and the
// node's start and the installation precede each selection. This runs the commands of the documents
// alone:
//
//	scripts/test-cluster.sh -run '^TestCluster$/^(uninstalled|the_documents)'
package cluster
