#!/usr/bin/env bash
# Runs the cluster suite: the plugin and the proxy on a real Kubernetes node, with MinIO as STS and S3 (test/cluster/doc.go).
# Needs root, Debian or Ubuntu, and Go. The first run builds Kubernetes, MinIO and helm, about twelve minutes on two cores; a run
# takes about five minutes after that. Arguments are passed on to go test: -run TestCluster/hundred.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
. scripts/group.sh
. test/cluster/node/settings.sh
export KUBE2IAM_CNI_CLUSTER_STATE=$STATE

# However the script ends, what it runs and the node end with it.
cleanup() {
  local status=$?
  trap - EXIT
  end_group
  "$SCRIPTS/stop.sh" || status=1
  exit "$status"
}

need_root
need_go
packages=(iptables nftables iproute2 openssl util-linux kmod procps buildah busybox-static ca-certificates debootstrap)
# Docker's own package has these two as well, and would have to go for Debian's.
command -v containerd >/dev/null || packages+=(containerd)
command -v runc >/dev/null || packages+=(runc)
need "${packages[@]}"

# One build and one node at a time. The daemons do not inherit the lock, so a node that outlived its script does not hold it.
mkdir -p "$CACHE"
exec 9<"$CACHE"
if ! flock --nonblock 9; then
  echo "another run is under way: it holds the lock of $CACHE" >&2
  exit 1
fi
trap cleanup EXIT
"$SCRIPTS/stop.sh" # what a killed run left

echo "== building"
in_group "$SCRIPTS/build.sh"

echo "== testing"
in_group go vet -tags cluster ./test/cluster/...
in_group go test -tags cluster ./test/cluster -count=1 -v -timeout 25m "$@"
