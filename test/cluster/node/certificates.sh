#!/usr/bin/env bash
# certificates.sh DIR: one authority, the certificates of all that serve or dial in the cluster, the key pair that signs
# ServiceAccount tokens, and a kubeconfig for each client. They are made for one run.
set -euo pipefail
. "$(dirname "$0")/settings.sh"
dir=$1
mkdir -p "$dir"
cd "$dir"

# signed NAME SUBJECT EXTENSION...: NAME.key, and NAME.crt signed by the authority.
signed() {
  local name=$1 subject=$2
  shift 2
  printf '%s\n' basicConstraints=CA:FALSE keyUsage=digitalSignature,keyEncipherment "$@" >"$name.ext"
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "$subject" -keyout "$name.key" -out "$name.csr"
  openssl x509 -req -in "$name.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile "$name.ext" -out "$name.crt"
  rm "$name.csr" "$name.ext"
}

client() { signed "$1" "$2" extendedKeyUsage=clientAuth; }

server() { signed "$1" "$2" extendedKeyUsage=serverAuth "subjectAltName=$3"; }

kubeconfig() {
  cat >"$1.kubeconfig" <<EOF
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://$NODE_IP:6443", certificate-authority: $dir/ca.crt}}]
users: [{name: $1, user: {client-certificate: $dir/$1.crt, client-key: $dir/$1.key}}]
contexts: [{name: test, context: {cluster: test, user: $1}}]
current-context: test
EOF
}

# openssl tells of every step on its error stream: shown only where one fails.
exec 3>&2 2>openssl.log
trap '[[ $? = 0 ]] || cat openssl.log >&3' EXIT

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=kubernetes-ca -keyout ca.key -out ca.crt
openssl genrsa -out sa.key 2048
openssl rsa -in sa.key -pubout -out sa.pub

service=kubernetes.default.svc
server apiserver /CN=kube-apiserver "DNS:localhost,DNS:$service,IP:127.0.0.1,IP:$SERVICE_IP,IP:$NODE_IP"
server kubelet-server "/O=system:nodes/CN=system:node:$NODE_NAME" "DNS:$NODE_NAME,IP:$NODE_IP"

# The API server knows each by its certificate's subject: the organisation is the group, the common name the user.
client admin /O=system:masters/CN=admin
client apiserver-kubelet /O=system:masters/CN=kube-apiserver-kubelet-client
client controller-manager /CN=system:kube-controller-manager
client scheduler /CN=system:kube-scheduler
client kubelet "/O=system:nodes/CN=system:node:$NODE_NAME"
client kube-proxy /CN=system:kube-proxy
for name in admin controller-manager scheduler kubelet kube-proxy; do
  kubeconfig $name
done
