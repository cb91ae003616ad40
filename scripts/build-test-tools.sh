#!/usr/bin/env bash
# Builds the programs that the demo, the suites and the benchmark run, and prints the directories that hold them on its
# last line, joined by ':' as in PATH.
#
#   scripts/build-test-tools.sh [external|clients]
#
# "external" leaves this repository's own programs out: it builds what other projects make, which is kept from then on.
# "clients" makes users' programs with the AWS SDKs (test/clients) alone.
# Everything goes to ${XDG_CACHE_HOME:-$HOME/.cache}/kube2iam-cni/bin, outside the repository.
set -euo pipefail

readonly plugins=v1.9.1             # github.com/containernetworking/plugins
readonly ec2_metadata_mock=v1.13.0  # github.com/aws/amazon-ec2-metadata-mock

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kube2iam-cni/bin
mkdir -p "$cache"

. "$repository/scripts/group.sh"

say() { echo "build-test-tools: $*" >&2; }

command -v go >/dev/null || { say "go is missing: https://go.dev/dl"; exit 1; }
command -v flock >/dev/null || { say "flock is missing (Debian package util-linux)"; exit 1; }

# One at a time: packages are tested in parallel, and each asks for the same programs.
# The lock is not passed on to go, whose children may outlive it.
exec 9>"$cache/.lock"
flock 9
go() { command go "$@" 9>&-; }

# What an ended build left: nobody else has the lock.
rm -rf "$cache"/.build.*

export CGO_ENABLED=0

# external DIRECTORY PACKAGE@VERSION... installs into the cache what is not there yet; all of it or nothing.
external() {
  local dir=$cache/$1 temporary
  shift
  if [[ ! -d $dir ]]; then
    say "building ${dir##*/} (once)"
    temporary=$(mktemp -d "$cache/.build.XXXXXX")
    in_group env -C "$temporary" "GOBIN=$temporary" go install -ldflags '-s -w' "$@"
    chmod 755 "$temporary"
    mv "$temporary" "$dir"
  fi
  directories+=("$dir")
}

directories=()
if [[ ${1:-} == clients ]]; then
  # By what they are made from, which are modules of their own: so the SDKs are compiled and linked, or installed, once.
  # made NAME FILE... -- COMMAND... runs a command that fills the directory $temporary with what the files make.
  made() {
    local name=$1 files=()
    shift
    while [[ $1 != -- ]]; do files+=("$1"); shift; done
    shift
    local dir=$cache/$name-$(cat "${files[@]}" | sha256sum | cut -c 1-12)
    if [[ ! -d $dir ]]; then
      say "making users' programs with the AWS SDKs: ${name#clients-} (once)"
      temporary=$(mktemp -d "$cache/.build.XXXXXX")
      "$@"
      chmod 755 "$temporary"
      mv "$temporary" "$dir"
    fi
    directories+=("$dir")
  }
  clients=$repository/test/clients
  build_go() { in_group env -C "$clients" go build -buildvcs=false -ldflags '-s -w' -o "$temporary/clients" .; }
  install_js() {
    cp "$clients"/js/{package.json,package-lock.json,.npmrc,main.mjs,v2.mjs} "$temporary"
    in_group npm --prefix "$temporary" ci --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel error >&2
  }
  command -v npm >/dev/null || { say "npm is missing (Debian packages nodejs and npm)"; exit 1; }
  made clients-go "$clients"/go.* "$clients"/*.go -- build_go
  made clients-js "$clients"/js/{package.json,package-lock.json,main.mjs,v2.mjs} -- install_js
  (IFS=:; echo "${directories[*]}")
  exit
fi
external "plugins-$plugins-2" \
  "github.com/containernetworking/plugins/plugins/main/bridge@$plugins" \
  "github.com/containernetworking/plugins/plugins/main/ptp@$plugins" \
  "github.com/containernetworking/plugins/plugins/main/loopback@$plugins" \
  "github.com/containernetworking/plugins/plugins/ipam/host-local@$plugins" \
  "github.com/containernetworking/plugins/plugins/meta/portmap@$plugins" \
  "github.com/containernetworking/plugins/plugins/meta/firewall@$plugins" \
  "github.com/containernetworking/plugins/plugins/meta/bandwidth@$plugins" \
  "github.com/containernetworking/plugins/plugins/meta/tuning@$plugins" \
  "github.com/containernetworking/plugins/plugins/main/macvlan@$plugins" \
  "github.com/containernetworking/plugins/plugins/main/ipvlan@$plugins"
external "ec2-metadata-mock-$ec2_metadata_mock" \
  "github.com/aws/amazon-ec2-metadata-mock/cmd/ec2-metadata-mock@$ec2_metadata_mock"

if [[ ${1:-} != external ]]; then
  # By the checkout's path: two checkouts do not overwrite each other's. Go's build cache makes this cheap, and compiles for
  # the demo and for tests without cgo, too: so no flag here that concerns the compiler.
  own=$cache/own-$(printf %s "$repository" | sha256sum | cut -c 1-12)
  mkdir -p "$own"
  [[ -e $own/kube2iam-proxy ]] || say "building kube2iam-cni, kube2iam-agent and kube2iam-proxy"
  cd "$repository"
  in_group go build -buildvcs=false -tags urfave_cli_no_docs -ldflags '-s -w' -o "$own/kube2iam-cni" ./plugin
  in_group go build -buildvcs=false -tags urfave_cli_no_docs -ldflags '-s -w' -o "$own/kube2iam-agent" ./plugin/agent
  in_group go build -buildvcs=false -tags urfave_cli_no_docs -ldflags '-s -w' -o "$own/kube2iam-proxy" ./proxy
  in_group go build -buildvcs=false -ldflags '-s -w' -o "$own/calicolike" ./test/calicolike
  directories+=("$own")
fi

(IFS=:; echo "${directories[*]}")
