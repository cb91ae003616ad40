package main

import (
	"fmt"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/kube"
)

// requestPace, in requests a second, and requestBurst bound what a node asks of the API server. A proxy that starts with restrictions lists
// and watches the namespace of each pod, and pods wait for these: all of them fit into the burst, for more pods than any node has. What
// requests of pods and their Events may add has bounds of its own.
const requestPace, requestBurst = 50, 600

// kubernetesClient reads where the API server is: from --api-server, else --kubeconfig, else the pod's service account.
func kubernetesClient(o *options) (*kube.Client, error) {
	config, err := kubernetesConfig(o)
	if err != nil {
		return nil, err
	}
	if o.apiToken != "" {
		config.BearerToken, config.BearerTokenFile = o.apiToken, ""
	}
	if o.insecure {
		config.TLSClientConfig = rest.TLSClientConfig{Insecure: true, CertData: config.CertData, KeyData: config.KeyData, CertFile: config.CertFile, KeyFile: config.KeyFile}
	}
	config.UserAgent = "kube2iam-proxy/" + version
	config.QPS, config.Burst = requestPace, requestBurst
	return kube.New(config)
}

func kubernetesConfig(o *options) (*rest.Config, error) {
	if o.apiServer == "" && o.kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("neither --api-server nor --kubeconfig is given, and this is no pod: %w", err)
		}
		return config, nil
	}
	rules := &clientcmd.ClientConfigLoadingRules{ExplicitPath: o.kubeconfig}
	overrides := &clientcmd.ConfigOverrides{ClusterInfo: api.Cluster{Server: o.apiServer}}
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubernetes configuration: %w", err)
	}
	return config, nil
}
