package main

import (
	"fmt"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/kube"
)

// maxQPS and maxBurst bound the requests to the API server. With namespace restrictions, a proxy
// that starts lists and watches the namespace of each pod, and pods wait for the answers: the burst
// has room for those of a full node. Requests of pods and Events have limits of their own.
const maxQPS, maxBurst = 50, 600

// newKubernetesClient returns a client of the API server that --api-server or --kubeconfig names,
// or else the pod's service account.
func newKubernetesClient(o *options) (*kube.Client, error) {
	var config *rest.Config
	var err error
	if o.apiServer == "" && o.kubeconfig == "" {
		config, err = rest.InClusterConfig()
	} else {
		config, err = clientcmd.BuildConfigFromFlags(o.apiServer, o.kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("--api-server %q, --kubeconfig %q: %w", o.apiServer, o.kubeconfig, err)
	}
	if o.apiToken != "" {
		config.BearerToken, config.BearerTokenFile = o.apiToken, ""
	}
	if o.insecure {
		config.Insecure, config.CAData, config.CAFile, config.ServerName = true, nil, "", ""
	}
	config.UserAgent = "kube2iam-proxy/" + version
	config.QPS, config.Burst = maxQPS, maxBurst
	return kube.New(config)
}
