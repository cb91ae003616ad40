#!/usr/bin/env bash
# Stops the node and removes what it left on the machine: its processes, its cgroups, its state. Nothing to stop is no error.
set -euo pipefail
. "$(dirname "$0")/settings.sh"

# The number in the file is trusted only while it is the node's first process: it may be another's by now.
is_node() { tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -qF test/cluster/node/init.sh; }

# Killing PID 1 of a PID namespace kills all that is in it; its mounts and its network go with the last of them. Its parent,
# which made the namespaces, sees that and ends.
if [[ -s $STATE/init.pid ]]; then
  node=$(cat "$STATE/init.pid")
  if is_node "$node"; then
    parent=$(awk '$1 == "PPid:" { print $2 }' "/proc/$node/status")
    kill -KILL "$node"
    while is_node "$node" || is_node "$parent"; do sleep 0.05; done
  fi
fi

# A cgroup can be removed once the kernel is done with the last process in it.
remove_cgroups() {
  local dir left=0
  for dir in "/sys/fs/cgroup/$CGROUP" /sys/fs/cgroup/*/"$CGROUP"; do
    [[ -d $dir ]] || continue
    find "$dir" -depth -type d -exec rmdir {} + 2>/dev/null || left=1
  done
  return $left
}
tries=0
until remove_cgroups; do
  tries=$((tries + 1))
  if [[ $tries -ge 100 ]]; then
    echo "cgroups $CGROUP: not empty after ten seconds" >&2
    exit 1
  fi
  sleep 0.1
done

if [[ -e $STATE/br_netfilter ]]; then
  modprobe -r br_netfilter
fi
rm -rf "$STATE"
