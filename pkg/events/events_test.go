package events

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

func somePod(uid string) *pods.Pod {
	return &pods.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "pod-" + uid, UID: types.UID("uid-" + uid)}}
}

// TestEventsReachTheAPIServer writes over a real socket, as the proxy does.
func TestEventsReachTheAPIServer(t *testing.T) {
	api, err := kubeapi.Start(kubeapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	client, err := kubernetes.NewForConfig(&rest.Config{Host: api.URL(), QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	e := New(client, "node-1")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	p := somePod("x")
	e.Refused(p, "IAMRoleInvalid", strings.Repeat("ä", 1000))
	deadline := time.After(20 * time.Second)
	for len(api.Events()) == 0 {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-deadline:
			t.Fatal("no event")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	got := api.Events()[0]
	if got.Namespace != "default" || got.InvolvedObject.Name != "pod-x" || got.InvolvedObject.UID != p.UID || got.InvolvedObject.Kind != "Pod" ||
		got.Type != corev1.EventTypeWarning || got.Reason != "IAMRoleInvalid" || got.Source.Component != "kube2iam-cni" || got.Source.Host != "node-1" ||
		len(got.Message) > 1024 || !strings.HasSuffix(got.Message, "ä...") {
		t.Errorf("%+v", got)
	}
}

// written runs tell and gives back how many Events were written by then.
func written(t *testing.T, tell func(e *Events)) (n int) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		e := New(client, "node-1")
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- e.Run(ctx) }()
		synctest.Wait()
		tell(e)
		synctest.Wait()
		for _, a := range client.Actions() {
			if a.GetResource().Resource == "events" {
				n++
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return n
}

func TestTheSameIsSaidOnceInAWhile(t *testing.T) {
	n := written(t, func(e *Events) {
		for range 100 {
			e.Refused(somePod("x"), "IAMRoleDenied", "no")
			time.Sleep(time.Second)
		}
	})
	if n != 1 {
		t.Errorf("%d events of the same in a hundred seconds", n)
	}
	n = written(t, func(e *Events) {
		for range 3 {
			e.Refused(somePod("x"), "IAMRoleDenied", "no")
			time.Sleep(pause)
			synctest.Wait()
		}
		e.PodGone(somePod("x"))
		if len(e.told) > 0 {
			t.Error("a pod that is gone is remembered")
		}
	})
	if n != 3 {
		t.Errorf("%d events, one a pause, want 3", n)
	}
}

// TestOnePodCannotFloodTheAPIServer has an annotation that is wrong in another way all the time.
func TestOnePodCannotFloodTheAPIServer(t *testing.T) {
	n := written(t, func(e *Events) {
		for i := range 1000 {
			e.Refused(somePod("x"), "IAMRoleInvalid", fmt.Sprint(i))
		}
		if len(e.told) > 1 || len(e.told[somePod("x").UID]) > maxSayings {
			t.Errorf("%d sayings are remembered", len(e.told))
		}
	})
	if n == 0 || n > 10 {
		t.Errorf("%d events", n)
	}
}
