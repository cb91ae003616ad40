#!/usr/bin/env bash
# Builds the two images, NAME/kube2iam-cni:TAG and NAME/kube2iam-proxy:TAG, stamped with this checkout's version and its commit's date: the
# same commit makes the same bytes.
#
#   scripts/images.sh registry.example.com/team 1 --platform=linux/amd64,linux/arm64 --push
#
# What comes behind the tag goes to the builder, which is `docker build` or what BUILDER says.
set -euo pipefail
cd "$(dirname "$0")/.."
if (($# < 2)) || [[ $1 = -* ]]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
fi
name=${1%/} tag=$2
shift 2
version=${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo dev)}
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
date=${DATE:-$(git log -1 --format=%cI 2>/dev/null || echo unknown)}
# BuildKit gives the image and its files this time.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH
for image in plugin:kube2iam-cni proxy:kube2iam-proxy; do
  # shellcheck disable=SC2086 # BUILDER is a command and its words
  ${BUILDER:-docker build} "$@" --file "Dockerfile.${image%:*}" --tag "$name/${image#*:}:$tag" \
    --build-arg VERSION="$version" --build-arg COMMIT="$commit" --build-arg DATE="$date" .
  echo "built $name/${image#*:}:$tag $version"
done
