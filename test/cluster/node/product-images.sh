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

# image DOCKERFILE NAME ARCH [OPTION...]: what it prints is the image's identity.
image() {
  build build "${@:4}" --isolation chroot --pull-never --timestamp 0 --file "$repository/$1" --tag "$2" \
    --volume "$(go env GOMODCACHE):/go/pkg/mod" --volume "$(go env GOCACHE):/root/.cache/go-build" \
    --build-arg GO_IMAGE="$base" --build-arg BUILDPLATFORM=linux/amd64 --build-arg TARGETARCH="$3" --build-arg GOPROXY=off --build-arg GOFLAGS=-mod=mod \
    --build-arg VERSION=suite --build-arg COMMIT="$(git -C "$repository" rev-parse HEAD)" --build-arg DATE=1970-01-01T00:00:00Z \
    --iidfile "$STATE/iid" "$repository" >"$LOGS/buildah.log" 2>&1 || { tail -n 20 "$LOGS/buildah.log" >&2; exit 1; }
  cat "$STATE/iid"
}

mkdir -p "$LOGS"
for name in plugin proxy; do
  tag=localhost/kube2iam-cni:suite
  [[ $name = plugin ]] || tag=localhost/kube2iam-proxy:suite
  began=$SECONDS
  id=$(image "Dockerfile.$name" "$tag" "$(go env GOARCH)")
  # The same bytes twice: with the same version and commit nothing depends on when or where it is built.
  again=$(image "Dockerfile.$name" "$tag-again" "$(go env GOARCH)" --no-cache)
  [[ $id = "$again" ]] || { echo "$tag: built again it is another image: $again, not $id" >&2; exit 1; }
  image "Dockerfile.$name" "$tag-arm64" arm64 --arch arm64 >/dev/null
  rm -f "$IMAGES/$name.tar"
  build push -q "$tag" "docker-archive:$IMAGES/$name.tar:$tag"
  echo "$tag: $id, $(stat -c %s "$IMAGES/$name.tar") bytes, $((SECONDS - began)) s"
done
