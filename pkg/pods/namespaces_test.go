package pods

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

func TestNamespacesKeepOneAnnotationAndTellOfChanges(t *testing.T) {
	api, err := kubeapi.Start(kubeapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	client, err := kubernetes.NewForConfig(&rest.Config{Host: api.URL(), QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	changed := make(chan string, 64)
	n, err := NewNamespaces(NamespacesConfig{Client: client, Key: "allowed", Changed: func(ns string) { changed <- ns }, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	api.PutNamespace("team", map[string]string{"allowed": "[1]", "other": "x"})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	<-n.Synced()

	if got, err := n.Annotations("team"); err != nil || len(got) != 1 || got["allowed"] != "[1]" {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := n.Annotations("nowhere"); !errors.Is(err, ErrNoNamespace) {
		t.Errorf("a namespace that is not there: %v", err)
	}
	api.PutNamespace("team", map[string]string{"allowed": "[2]"})
	for deadline := time.After(20 * time.Second); ; {
		select {
		case ns := <-changed:
			if got, _ := n.Annotations("team"); ns == "team" && got["allowed"] == "[2]" {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
				return
			}
		case <-deadline:
			t.Fatal("no word of the change")
		}
	}
}
