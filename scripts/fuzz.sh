#!/usr/bin/env bash
# Runs each fuzz target: fuzz.sh [TIME], 30s by default. `make test` gives each one second; go test runs the seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
. scripts/group.sh
need_go
time=${1:-30s}
for target in imds:FuzzCredentialsPathsAreNeverForwarded imds:FuzzRawRequestsNeverReachCredentials imds:FuzzForgedTokensAreInvalid netconf:FuzzParse conflist:FuzzInsert rules:FuzzRecordsYieldTheirOwnRulesOnly; do
  echo "== ${target#*:}"
  in_group go test -run '^$' -fuzz "^${target#*:}\$" -fuzztime "$time" "./pkg/${target%:*}"
done
