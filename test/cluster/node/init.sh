#!/usr/bin/env bash
# PID 1 of the node, in namespaces of its own: mounts, network, daemons. When it dies the kernel kills all the rest.
set -euo pipefail
. "$(dirname "$0")/settings.sh"
export PATH=$BIN:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# The /proc of the machine is still mounted here, and so tells the number by which the machine knows this process.
read -r pid_outside _ </proc/self/stat
echo "$pid_outside" >"$STATE/init.pid"

# The default paths are the node's own: overlays take what is written to the machine's directories.
mounts() {
  mount --make-rprivate /
  mount -t proc proc /proc
  # A fresh sysfs shows the devices of this network namespace; the cgroups are moved over from the old one.
  mkdir -p "$STATE/mnt/cgroup"
  mount --rbind /sys/fs/cgroup "$STATE/mnt/cgroup"
  umount -l /sys
  mount -t sysfs sysfs /sys
  mount --rbind "$STATE/mnt/cgroup" /sys/fs/cgroup
  umount -l "$STATE/mnt/cgroup"

  local dir layer
  for dir in etc opt var; do
    layer=$STATE/overlay/$dir
    mkdir -p "$layer/upper" "$layer/work"
    mount -t overlay overlay -o "lowerdir=/$dir,upperdir=$layer/upper,workdir=$layer/work" "/$dir"
  done
  mount -t tmpfs -o mode=755 run /run
  mkdir -p /run/lock /run/netns
  # No overlay on an overlay: what containerd mounts must lie on the disk itself.
  for dir in lib/containerd lib/kubelet lib/etcd log/pods; do
    mkdir -p "$STATE/var/$dir" "/var/$dir"
    mount --bind "$STATE/var/$dir" "/var/$dir"
  done
  mkdir -p /var/log/containers

  # The kubelet insists on these values, which are the whole machine's: it is shown them instead.
  local setting file
  for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1; do
    file=$STATE/mnt/${setting//[\/=]/-}
    echo "${setting#*=}" >"$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
  done
  mount --make-rshared /
}

# The metadata service is beyond the node, as it is on EC2: what the node sends it takes OUTPUT, what a pod sends it takes
# FORWARD. It and STS and S3 are in a network namespace that the node's default route leads to.
network() {
  hostname "$NODE_NAME"
  ip link set lo up
  ip netns add outside
  ip link add eth0 type veth peer name eth0 netns outside
  ip -n outside link set lo up
  ip -n outside address add "$METADATA_IP/32" dev lo
  ip -n outside address add "$OUTSIDE_IP/24" dev eth0
  ip -n outside link set eth0 up
  ip address add "$NODE_IP/24" dev eth0
  ip link set eth0 up
  ip route add default via "$OUTSIDE_IP"
  echo 1 >/proc/sys/net/ipv4/ip_forward
  echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables
}

cni() {
  [[ ! -e $STATE/booted ]] || return 0 # all of it is on the disk
  touch "$STATE/booted"
  mkdir -p /etc/cni/net.d /opt/cni/programs
  rm -f /etc/cni/net.d/* # the machine's own, in the layer below
  cp "$BIN"/{bridge,host-local,loopback,portmap} /opt/cni/programs/
  cp "$SCRIPTS/pods.conflist" /etc/cni/net.d/10-pods.conflist
  # The same network for the runtime "unchained", which the agent does not know.
  mkdir -p /etc/cni/unchained
  sed 's/"pods"/"unchained"/; s/cni0/cni1/; s,10[.]244[.]0[.]0/24,10.244.128.0/24,' "$SCRIPTS/pods.conflist" >/etc/cni/unchained/10-unchained.conflist
}

# The kubelet wants its root cgroup to be there, with every controller.
cgroups() {
  local dir
  if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
    for dir in cpuset cpu io memory hugetlb pids; do
      echo "+$dir" >/sys/fs/cgroup/cgroup.subtree_control || echo "no cgroup controller $dir"
    done
    mkdir -p "/sys/fs/cgroup/$CGROUP"
    return
  fi
  for dir in /sys/fs/cgroup/*/; do
    mkdir -p "$dir$CGROUP"
  done
}

# until_true COMMAND...: waits for what a daemon takes a moment to offer; start.sh bounds the wait.
until_true() { until "$@" >/dev/null 2>&1; do sleep 0.1; done; }

containerd_daemon() {
  mkdir -p /etc/containerd
  cp "$SCRIPTS/containerd.toml" /etc/containerd/config.toml # where the agent finds the places
  containerd >"$LOGS/containerd.log" 2>&1 &
  until_true ctr version
  local archive
  for archive in "$IMAGES"/*.tar; do
    ctr -n k8s.io images import "$archive"
  done
}

api_server() {
  etcd --data-dir /var/lib/etcd --unsafe-no-fsync --log-level warn \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 >"$LOGS/etcd.log" 2>&1 &
  kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
    --bind-address=0.0.0.0 --secure-port=6443 --advertise-address="$NODE_IP" \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
    --client-ca-file="$PKI/ca.crt" --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
    --service-account-issuer=https://kubernetes.default.svc \
    --service-account-key-file="$PKI/sa.pub" --service-account-signing-key-file="$PKI/sa.key" \
    --kubelet-client-certificate="$PKI/apiserver-kubelet.crt" --kubelet-client-key="$PKI/apiserver-kubelet.key" \
    --kubelet-certificate-authority="$PKI/ca.crt" --kubelet-preferred-address-types=InternalIP \
    --service-cluster-ip-range="$SERVICE_CIDR" --endpoint-reconciler-type=lease \
    >"$LOGS/apiserver.log" 2>&1 &
}

controllers() {
  kube-controller-manager --kubeconfig="$PKI/controller-manager.kubeconfig" --leader-elect=false \
    --use-service-account-credentials --service-account-private-key-file="$PKI/sa.key" --root-ca-file="$PKI/ca.crt" \
    --allocate-node-cidrs --cluster-cidr="$POD_CIDR" --bind-address=127.0.0.1 >"$LOGS/controller-manager.log" 2>&1 &
  kube-scheduler --kubeconfig="$PKI/scheduler.kubeconfig" --leader-elect=false --bind-address=127.0.0.1 \
    >"$LOGS/scheduler.log" 2>&1 &
}

# oom-score-adj: where CAP_SYS_RESOURCE is missing it cannot be lowered, and these two would end for it.
node_daemons() {
  sed "s,@PKI@,$PKI,g; s,@CGROUP@,$CGROUP,g" "$SCRIPTS/kubelet.yaml" >"$STATE/kubelet.yaml"
  kubelet --config="$STATE/kubelet.yaml" --kubeconfig="$PKI/kubelet.kubeconfig" --root-dir=/var/lib/kubelet \
    --hostname-override="$NODE_NAME" --node-ip="$NODE_IP" --oom-score-adj=0 >"$LOGS/kubelet.log" 2>&1 &
  kube-proxy --kubeconfig="$PKI/kube-proxy.kubeconfig" --proxy-mode=nftables --cluster-cidr="$POD_CIDR" \
    --hostname-override="$NODE_NAME" --oom-score-adj=0 --conntrack-max-per-core=0 \
    --metrics-bind-address=127.0.0.1:10249 --healthz-bind-address=127.0.0.1:10256 >"$LOGS/kube-proxy.log" 2>&1 &
}

mounts
network
cni
cgroups
api_server
containerd_daemon
until_true kubectl --kubeconfig "$PKI/admin.kubeconfig" get --raw /readyz
controllers
until_true test ! -e "$STATE/hold" # somebody wants to be there before the first pod
node_daemons
touch /run/node-started

# All that is started above runs until the node is stopped: half a node is none.
ended=0
wait -n || ended=$?
echo "a daemon ended with status $ended; these are left:"
jobs -r
exit 1
