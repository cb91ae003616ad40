#!/usr/bin/env bash
# gofmt, go vet, and a tidy go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
need_go
files=$(gofmt -l $(git ls-files '*.go'))
[ -z "$files" ] || { echo "gofmt would change:" >&2; echo "$files" >&2; exit 1; }
go vet ./...
go vet -tags cluster ./test/cluster/...
go mod tidy -diff
echo "lint: ok"
