#!/usr/bin/env bash
# Prints figures on standard output, one a line: name, value, unit. Progress goes to standard error.
# PART in the environment is the name of the only part to measure; "list" lists the names.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
. scripts/group.sh
need_root >&2
need_go >&2
need iptables nftables iproute2 kmod >&2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kube2iam-cni/bin
echo "building the benchmark" >&2
CGO_ENABLED=0 in_group go build -buildvcs=false -o "$cache/bench" ./test/bench
part=${PART:-}
if [[ $part != cluster ]]; then
  "$cache/bench" $part
  [[ -z $part ]] || exit 0
fi
# What only a real node shows: the suite prints these among its own lines.
echo "measuring on a real Kubernetes node: six minutes, and twelve more the first time, to build it" >&2
scripts/test-cluster.sh -run '^TestCluster$/^(the_plugin_is_chained|a_pod_starts|the_first_request_of|ten_upgrades|a_proxy_that_is_killed)' | tee >(cat >&2) | sed -n 's/^figure //p'
