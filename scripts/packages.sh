# Sourced by the other scripts: installs the Debian or Ubuntu packages that are missing, by name.

# need PACKAGE... installs those of the packages that are not installed yet, and says which.
need() {
  local missing=() p
  for p in "$@"; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$p")
  done
  [ ${#missing[@]} -eq 0 ] && return
  if [ "$(id -u)" != 0 ]; then
    echo "missing packages: ${missing[*]}; run as root, or install them first" >&2
    return 1
  fi
  echo "installing packages: ${missing[*]}"
  local log
  log=$(mktemp)
  if ! { DEBIAN_FRONTEND=noninteractive apt-get update -q && \
         DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -20 "$log" >&2
    rm -f "$log"
    echo "could not install: ${missing[*]}" >&2
    return 1
  fi
  rm -f "$log"
}

# need_root stops whoever is not root: network namespaces and iptables are root's.
need_root() {
  [ "$(id -u)" = 0 ] || { echo "$0: run as root: it makes network namespaces and iptables rules in them" >&2; exit 1; }
}

# need_go stops where there is no Go, or one that is too old for go.mod.
need_go() {
  command -v go >/dev/null || { echo "$0: Go is missing: https://go.dev/doc/install" >&2; exit 1; }
  go list -m >/dev/null || { echo "$0: this Go cannot build the module: see go.mod for the version that it needs" >&2; exit 1; }
}
