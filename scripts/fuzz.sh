#!/usr/bin/env bash
# Each fuzz target for a while: fuzz.sh [TIME], 30s by default. `make test` runs their seeds only.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
. scripts/group.sh
need_go
time=${1:-30s}
for target in imds:FuzzCredentialsPathsAreNeverForwarded imds:FuzzForgedTokensAreInvalid netconf:FuzzParse; do
  echo "== ${target#*:}"
  in_group go test -run '^$' -fuzz "^${target#*:}\$" -fuzztime "$time" "./pkg/${target%:*}"
done
