#!/usr/bin/env bash
# Builds the three binaries into bin/ (or the directory given), static and stamped.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/group.sh
out=${1:-bin}
version=${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo dev)}
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
# The commit's date, not the clock's: the same source makes the same bytes.
date=${DATE:-$(git log -1 --format=%cI 2>/dev/null || echo unknown)}
export CGO_ENABLED=0
for cmd in plugin:kube2iam-cni plugin/agent:kube2iam-agent proxy:kube2iam-proxy; do
  in_group go build -trimpath -buildvcs=false -tags urfave_cli_no_docs -ldflags "-s -w -X main.version=$version -X main.commit=$commit -X main.date=$date" \
    -o "$out/${cmd#*:}" "./${cmd%:*}"
  echo "built $out/${cmd#*:} $version"
done
