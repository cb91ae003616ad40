#!/usr/bin/env bash
# Each fuzz target for a while: fuzz.sh [TIME], 30s by default; `make test` gives each five seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
. scripts/group.sh
need_go
time=${1:-30s}
for target in imds:FuzzCredentialsPathsAreNeverForwarded imds:FuzzRawRequestsNeverReachCredentials imds:FuzzForgedTokensAreInvalid netconf:FuzzParse conflist:FuzzChain rules:FuzzRecordsYieldTheirOwnRulesOnly; do
  echo "== ${target#*:}"
  in_group go test -run '^$' -fuzz "^${target#*:}\$" -fuzztime "$time" "./pkg/${target%:*}"
done
