# shellcheck shell=bash disable=SC2034
# What every script of the node reads first: versions, addresses and places. It does nothing.

KUBERNETES_VERSION=v1.37.2
HELM_VERSION=v3.22.0
MINIO_VERSION=v0.0.0-20260212201848-7aac2a2c5b7c

# The node, on a veth whose other end is the network "outside": what lies beyond the node has no way further.
NODE_NAME=ip-10-0-12-34.eu-central-1.compute.internal # as long as AWS has them
NODE_IP=192.168.250.10
OUTSIDE_IP=192.168.250.1
METADATA_IP=169.254.169.254
POD_CIDR=10.244.0.0/16
SERVICE_CIDR=10.96.0.0/16
SERVICE_IP=10.96.0.1 # the API server's, the first of SERVICE_CIDR

# Every container of the node is in this cgroup, so that what is left of one is told from the machine's own.
CGROUP=kube2iam-cni-cluster

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SUITE=$(dirname "$SCRIPTS")

# What takes minutes to build is kept between runs.
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/kube2iam-cni/cluster

# All that one run writes: made by build.sh, removed by stop.sh. One place, so that the next run finds what a killed one left.
STATE=${KUBE2IAM_CNI_CLUSTER_STATE:-/tmp/kube2iam-cni-cluster}
BIN=$STATE/bin
IMAGES=$STATE/images
PKI=$STATE/pki
LOGS=$STATE/log
