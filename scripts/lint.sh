#!/usr/bin/env bash
# gofmt, go vet, and a tidy go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
. scripts/group.sh
need_go
files=$(gofmt -l plugin proxy pkg test)
[ -z "$files" ] || { echo "gofmt would change:" >&2; echo "$files" >&2; exit 1; }
# Without cgo, as the programs are built: so each package is compiled once for both.
export CGO_ENABLED=0
in_group go vet ./...
in_group go mod tidy -diff
# A module of its own: what users' programs need is not what this project needs.
in_group go -C test/clients vet ./...
in_group go -C test/clients mod tidy -diff
echo "lint: ok"
