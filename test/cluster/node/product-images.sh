#!/usr/bin/env bash
# product-images.sh: builds the images of this repository by its own Dockerfiles, with buildah and without a registry, into $IMAGES.
# What FROM names is made of this machine's Go, a shell, and certificates; modules come from the machine's module cache.
set -euo pipefail
. "$(dirname "$0")/settings.sh"
repository=$(cd "$SUITE/../.." && pwd)

# In namespaces of its own: buildah leaves mounts and rules behind.
if [[ ${1:-} != inside ]]; then
  exec unshare --mount --net --propagation private "$0" inside
fi

store=$CACHE/containers-$(go env GOVERSION)
build() { buildah --root "$store" --runroot "$STATE/containers" --storage-driver vfs "$@"; }

base=localhost/golang:1.26
if ! build inspect --type image "$base" >/dev/null 2>&1; then
  echo "$base: making it of this machine's Go, once"
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  mkdir -p "$root"/{bin,tmp,etc/ssl/certs,usr/local}
  cp -rL "$(go env GOROOT)" "$root/usr/local/go"
  rm -rf "$root/usr/local/go"/{test,api,doc,misc}
  cp "$(command -v busybox)" "$root/bin/busybox"
  for name in sh cat cp mkdir rm; do ln -s busybox "$root/bin/$name"; done
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  container=$(build from scratch)
  build copy -q "$container" "$root" /
  build config --env PATH=/usr/local/go/bin:/bin --env GOTOOLCHAIN=local --env GOPATH=/go --env GOCACHE=/root/.cache/go-build "$container"
  build commit -q "$container" "$base"
  build rm "$container" >/dev/null
  rm -rf "$root"
  trap - EXIT
fi

# images TAG ARCH [OPTION...]: both, as an operator builds them.
images() {
  export DATE=1970-01-01T00:00:00Z VERSION=suite
  BUILDER="$SCRIPTS/operator/docker build" "$repository/scripts/images.sh" localhost "$1" "${@:3}" --platform "linux/$2" \
    >"$LOGS/buildah.log" 2>&1 || { tail -n 20 "$LOGS/buildah.log" >&2; exit 1; }
}

identity() { build inspect --type image --format '{{.FromImageID}}' "$1"; }

# machine IMAGE PROGRAM: what its ELF header says that it is for.
machine() {
  local container root
  container=$(build from --pull-never "$1")
  root=$(build mount "$container")
  od -An -t u2 -j 18 -N 2 "$root/$2" | tr -d ' '
  build rm "$container" >/dev/null
}

mkdir -p "$LOGS"
began=$SECONDS
images suite "$(go env GOARCH)"
# The same bytes twice: with the same version and commit nothing depends on when it is built.
images again "$(go env GOARCH)" --no-cache
images arm64 arm64
for name in kube2iam-cni kube2iam-proxy; do
  image=localhost/$name
  id=$(identity "$image:suite") again=$(identity "$image:again")
  [[ -n $id && $id = "$again" ]] || { echo "$image: built again it is another image: $again, not $id" >&2; exit 1; }
  [[ $(machine "$image:arm64" "$name") = 183 ]] || { echo "$image:arm64: the program is not for arm64" >&2; exit 1; }
  rm -f "$IMAGES/$name.tar"
  build push -q "$image:suite" "docker-archive:$IMAGES/$name.tar:$image:suite"
  awk -v name="${name//-/_}" -v bytes="$(stat -c %s "$IMAGES/$name.tar")" 'BEGIN { printf "figure image_%s_mb %.1f MB\n", name, bytes / 1e6 }'
done
echo "images built in $((SECONDS - began)) s"
