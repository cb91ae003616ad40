#!/usr/bin/env bash
# What a large fleet asks of STS: a table on standard output, and docs/scale.svg. The same every time.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
. scripts/group.sh
need_go
in_group go run ./test/simulate docs/scale.svg
