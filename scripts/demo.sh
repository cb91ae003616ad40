#!/usr/bin/env bash
# The demo: installs what is missing and runs test/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
. scripts/group.sh
need_root
need_go
need iptables nftables iproute2 kmod curl
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kube2iam-cni/bin
echo "building the demo"
CGO_ENABLED=0 in_group go build -buildvcs=false -o "$cache/demo" ./test/demo
# In this shell's place, so that an interrupt reaches the demo itself, which cleans up.
exec "$cache/demo"
