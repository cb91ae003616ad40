#!/usr/bin/env bash
# The figures: one line each on standard output, name, value, unit. What it is doing goes to standard error.
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
exec "$cache/bench"
