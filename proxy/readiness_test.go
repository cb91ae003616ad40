package main

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

// unshown is an API server that reports no namespace until shows is closed.
type unshown struct {
	fakeAPI
	shows chan struct{}
}

func (u unshown) FollowNamespace(ctx context.Context, _ string, report func(map[string]string, bool)) error {
	select {
	case <-u.shows:
		report(nil, true)
	case <-ctx.Done():
	}
	<-ctx.Done()
	return nil
}

// TestReadiness: the proxy is ready once its pods and their namespaces are known. A namespace that becomes
// known later does not make it unready.
func TestReadiness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pod := func(namespace string) *corev1.Pod {
			return &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "pod", UID: types.UID(namespace), Annotations: map[string]string{roleKey: "reader"}},
				Spec:       corev1.PodSpec{NodeName: "node-1"},
			}
		}
		clients := fake.NewClientset(pod("ns"))
		client := &unshown{fakeAPI{clients}, make(chan struct{})}
		p, _, end := startComponents(t, client, func(o *options) { o.rules.Restriction = &roles.Restriction{Key: "allowed", Format: roles.Glob} })
		defer end()
		<-p.watch.Synced()
		time.Sleep(time.Second)
		if p.isReady() {
			t.Error("ready before the namespace is known")
		}
		close(client.shows)
		synctest.Wait()
		if !p.isReady() {
			t.Error("not ready although the pods and namespaces are known")
		}
		client.shows = nil
		if _, err := clients.CoreV1().Pods("late").Create(t.Context(), pod("late"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if p.watch.Len() != 2 || !p.isReady() {
			t.Errorf("%d pods, ready %v", p.watch.Len(), p.isReady())
		}
	})
}

// TestStartWithManyNamespaces uses the client of the proxy, with its limits, on a node with a pod in each of
// 250 namespaces. Each costs a list and a watch; if these did not fit in the burst, most pods would give up
// before the proxy is ready.
func TestStartWithManyNamespaces(t *testing.T) {
	api, err := kubeapi.Start(kubeapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	const pods = 250
	if maxBurst < 2*pods {
		t.Errorf("the burst is %d requests, and %d pods need %d", maxBurst, pods, 2*pods)
	}
	for i := range pods {
		ns := fmt.Sprint("ns-", i)
		api.PutNamespace(ns, map[string]string{"allowed": `["*"]`})
		api.PutPod(kubeapi.NewPod("node-1", ns, "pod", map[string]string{roleKey: "reader"}))
	}
	client, err := newKubernetesClient(&options{apiServer: api.URL()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	p, _, end := startComponents(t, client, func(o *options) { o.rules.Restriction = &roles.Restriction{Key: "allowed", Format: roles.Glob} })
	defer end()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !p.isReady() || p.cache.Stats().Holders < pods {
		<-tick.C
	}
}
