#!/usr/bin/env bash
# image.sh NAME:TAG ROOT BINARY FILE: makes an image of the directory ROOT whose entry point is /BINARY, as the archive that
# `ctr images import` reads (https://github.com/moby/docker-image-spec/blob/main/v1.2.md, "combined image JSON + filesystem").
set -euo pipefail
name=$1 root=$2 binary=$3 file=$4

archive=$(mktemp -d)
trap 'rm -rf "$archive"' EXIT
# The same input gives the same layer: its digest does not depend on when or by whom it was made.
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$root" -cf "$archive/layer.tar" .
digest=$(sha256sum "$archive/layer.tar" | cut -d' ' -f1)
cat >"$archive/config.json" <<EOF
{
  "architecture": "$(go env GOARCH)",
  "os": "linux",
  "created": "1970-01-01T00:00:00Z",
  "config": {"Entrypoint": ["/$binary"]},
  "rootfs": {"type": "layers", "diff_ids": ["sha256:$digest"]},
  "history": [{"created": "1970-01-01T00:00:00Z"}]
}
EOF
cat >"$archive/manifest.json" <<EOF
[{"Config": "config.json", "RepoTags": ["$name"], "Layers": ["layer.tar"]}]
EOF
tar -C "$archive" -cf "$file" manifest.json config.json layer.tar
