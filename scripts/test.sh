#!/usr/bin/env bash
# Unit tests with the race detector, the fuzz targets for a bounded time, then the namespace suite.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
need_root
need_go
# gcc and libc for the race detector; the rest for the namespace suite and its unmodified clients.
need gcc libc6-dev iptables nftables iproute2 conntrack kmod curl awscli python3-boto3
scripts/lint.sh
echo "== unit tests, with the race detector"
go test -race -count=1 $(go list ./... | grep -v /test/netns)
echo "== allocations, without it"
go test -count=1 -run Allocations ./pkg/imds
echo "== fuzzing, a few seconds each"
go test -run '^$' -fuzz FuzzCredentialsPathsAreNeverForwarded -fuzztime 5s ./pkg/imds
go test -run '^$' -fuzz FuzzForgedTokensAreInvalid -fuzztime 3s ./pkg/imds
go test -run "^$" -fuzz FuzzParse -fuzztime 3s ./pkg/netconf
echo "== the namespace suite: real CNI plugins and clients in network namespaces"
# Without cgo, as the programs under test: so each package is compiled once for both.
CGO_ENABLED=0 go test -count=1 -timeout 10m -v ./test/netns | grep --line-buffered -Ev '^=== (RUN|PAUSE|CONT|NAME)'
