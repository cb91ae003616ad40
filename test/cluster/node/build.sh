#!/usr/bin/env bash
# Builds what the suite runs. Kubernetes and MinIO are built once, about eight minutes on two cores, and kept in the cache by
# version, Go version and source; images and the programs of this repository are made for each run.
set -euo pipefail
. "$(dirname "$0")/settings.sh"

# No C: the same binaries run on the node and in images that hold nothing else.
export CGO_ENABLED=0
GO_VERSION=$(go env GOVERSION)

# cached NAME VERSION COMMAND: runs "COMMAND DIRECTORY" to fill the directory of the name and the versions, unless that was
# done before, and leaves the directory in $dir. A build that is interrupted leaves nothing that looks like a whole one.
cached() {
  local name=$1 version=$2 command=$3
  dir=$CACHE/$name-$version-$GO_VERSION
  if [[ -d $dir ]]; then
    echo "$name $version: built before, in $dir"
    return
  fi
  local began=$SECONDS partial=$dir.partial
  echo "$name $version: building, once"
  rm -rf "$partial"
  mkdir -p "$partial"
  "$command" "$partial"
  mv "$partial" "$dir"
  echo "$name $version: built in $((SECONDS - began)) s"
}

# Kubernetes stamps its version at link time; without it the API server calls itself v0.0.0 and the kubelet refuses it.
kubernetes() {
  local version=$KUBERNETES_VERSION component=k8s.io/component-base/version client=k8s.io/client-go/pkg/version
  local minor=${version#v1.}
  minor=${minor%%.*}
  local stamp="-X $component.gitVersion=$version -X $component.gitMajor=1 -X $component.gitMinor=$minor"
  stamp+=" -X $component.gitCommit=0000000000000000000000000000000000000000 -X $component.gitTreeState=clean"
  stamp+=" -X $component.buildDate=2026-01-01T00:00:00Z"
  stamp+=" -X $client.gitVersion=$version -X $client.gitMajor=1 -X $client.gitMinor=$minor"
  go build -C "$SUITE/kube1" -trimpath -ldflags "-s -w $stamp" -o "$1/kube1" .
}

minio() {
  GOBIN=$1 go install -trimpath -ldflags "-s -w" "github.com/minio/minio@$MINIO_VERSION"
}

helm() {
  GOBIN=$1 go install -trimpath -ldflags "-s -w" "helm.sh/helm/v3/cmd/helm@$HELM_VERSION"
}

# An image that holds Debian's awscli and what it needs, and nothing of ours.
awscli() {
  local mirror
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
  debootstrap --variant=minbase --include=awscli,python3-cffi-backend "$SUITE_OF_DEBIAN" "$1/root" "$mirror" >"$1/debootstrap.log" 2>&1 || { tail -n 20 "$1/debootstrap.log" >&2; return 1; }
  rm -rf "$1"/root/{var/cache/apt,var/lib/apt/lists,usr/share/doc,usr/share/man,usr/share/locale,dev,proc,sys}
  "$SCRIPTS/image.sh" localhost/awscli:1 "$1/root" usr/bin/aws "$1/awscli.tar"
  rm -rf "$1/root"
}

# image BINARY: an image that holds the one static binary.
image() {
  local root
  root=$(mktemp -d)
  cp "$BIN/$1" "$root/"
  "$SCRIPTS/image.sh" "localhost/$1:1" "$root" "$1" "$IMAGES/$1.tar"
  rm -rf "$root"
}

mkdir -p "$CACHE" "$BIN" "$IMAGES"

source_hash=$(cat "$SUITE"/kube1/{main.go,go.mod,go.sum} | sha256sum | cut -c1-12)
cached kubernetes "$KUBERNETES_VERSION-$source_hash" kubernetes
for name in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do
  ln -sfn "$dir/kube1" "$BIN/$name"
done
cached minio "$MINIO_VERSION" minio
ln -sfn "$dir/minio" "$BIN/minio"

cached helm "$HELM_VERSION" helm
ln -sfn "$dir/helm" "$BIN/helm"

SUITE_OF_DEBIAN=$(. /etc/os-release && echo "$VERSION_CODENAME")
cached awscli "$SUITE_OF_DEBIAN" awscli
ln -sfn "$dir/awscli.tar" "$IMAGES/awscli.tar"

echo "the CNI plugins, Amazon's metadata mock, kube2iam-cni and kube2iam-proxy: building"
directories=$("$SUITE/../../scripts/build-test-tools.sh" | tail -n 1)
IFS=: read -ra directories <<<"$directories"
for dir in "${directories[@]}"; do
  ln -sfn "$dir"/* "$BIN/"
done

echo "the images: building"
cd "$SUITE"
go build -trimpath -ldflags "-s -w" -o "$BIN/" ./pause ./firstrequest ./refuser
go build -C s3lister -trimpath -ldflags "-s -w" -o "$BIN/s3lister" .
for name in pause firstrequest refuser s3lister; do
  image "$name"
done
# The image that the README's example names.
root=$(mktemp -d)
mkdir "$root/bin"
cp "$(command -v busybox)" "$root/bin/busybox"
for name in sh sleep wget; do ln -s busybox "$root/bin/$name"; done
"$SCRIPTS/image.sh" docker.io/library/busybox:1.36 "$root" bin/busybox "$IMAGES/busybox.tar"
rm -rf "$root"
"$SCRIPTS/product-images.sh"
