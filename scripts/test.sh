#!/usr/bin/env bash
# gofmt and go vet, the unit tests with the race detector, then the namespace suite.
# RUN in the environment is a regular expression: only tests that match it run, and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
. scripts/group.sh
need_root
need_go
# gcc and libc for the race detector; the rest for the namespace suite and its unmodified clients.
need gcc libc6-dev iptables nftables iproute2 conntrack kmod curl awscli python3-boto3 cloud-init s3cmd ruby-fog-aws strace
command -v npm >/dev/null || need nodejs npm # of Node.js 18 or later, wherever it comes from
run_matching() {
  # Packages without a matching test say so; only the others are of interest.
  in_group go test -race -count=1 -run "$RUN" $(go list ./... | grep -v /test/netns$) | sed '/no test files\|no tests to run/d'
  CGO_ENABLED=0 in_group go test -count=1 -v -parallel 8 -timeout 15m -run "$RUN" ./test/netns
}
if [[ -n ${RUN:-} ]]; then
  run_matching
  exit
fi
in_group scripts/lint.sh
echo "== unit tests, with the race detector"
# Packages wait for the kernel more than they compute: more of them at a time than there are cores.
in_group go test -race -count=1 -p 4 $(go list ./... | grep -v '/test/netns$\|/test/scale$')
# Without cgo from here on, as the programs under test: so each package is compiled once for both.
export CGO_ENABLED=0
echo "== fuzz targets, one second each"
in_group scripts/fuzz.sh 1s
echo "== the simulated fleet and allocations, without the race detector"
in_group go test -count=1 ./test/scale
in_group go test -count=1 -run Allocations ./pkg/imds
echo "== the namespace suite: real CNI plugins and clients in network namespaces"
# Tests wait for timers of the kernel and of clients: more of them at a time than there are cores.
in_group go test -count=1 -parallel 8 -timeout 15m ./test/netns
