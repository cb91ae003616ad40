#!/usr/bin/env bash
# Starts the node that build.sh built, in network, mount, PID, UTS and IPC namespaces of its own, and returns when it takes
# pods. The default paths (/etc/cni/net.d, /opt/cni, /run/containerd) are the node's own in there, not the machine's.
set -euo pipefail
. "$(dirname "$0")/settings.sh"

if [[ -e $STATE/init.pid ]]; then
  echo "a node is running, or one was not stopped: $SCRIPTS/stop.sh" >&2
  exit 1
fi
mkdir -p "$LOGS"

say() { printf 'node: %s (%d s)\n' "$1" "$SECONDS"; }

fail() {
  echo "node: $1; the end of its log:" >&2
  tail -n 20 "$LOGS/init.log" >&2
  exit 1
}

# wait_for WHAT COMMAND...: at most until the start has taken ninety seconds, and only while the node lives.
wait_for() {
  local what=$1
  shift
  until "$@" >/dev/null 2>&1; do
    kill -0 "$node" 2>/dev/null || fail "ended before: $what"
    [[ $SECONDS -lt 90 ]] || fail "not there after $SECONDS s: $what"
    sleep 0.1
  done
  say "$what"
}

ready() {
  local status
  status=$("$SCRIPTS/in" kubectl get node "$NODE_NAME" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')
  [[ $status = True ]]
}

# Pods on bridges pass the node's rules only with this module. stop.sh unloads it if it was not loaded before.
if [[ ! -e /proc/sys/net/bridge/bridge-nf-call-iptables ]]; then
  modprobe br_netfilter
  touch "$STATE/br_netfilter"
fi
[[ -e $PKI/ca.crt ]] || "$SCRIPTS/certificates.sh" "$PKI" # they outlive a reboot
setsid unshare --net --mount --pid --uts --ipc --fork --kill-child=SIGKILL --propagation private \
  "$SCRIPTS/init.sh" >"$LOGS/init.log" 2>&1 </dev/null &
node=$!

wait_for "namespaces made" test -s "$STATE/init.pid"
wait_for "daemons started" "$SCRIPTS/in" test -e /run/node-started
wait_for "node Ready" ready
# Without it a pod is refused: the controller that makes it is only just running.
wait_for "default ServiceAccount made" "$SCRIPTS/in" kubectl get serviceaccount default
