package main

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/kube"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

func get(h http.Handler, path string) (int, string) {
	return getFrom(h, "127.0.0.1:4711", path)
}

func getFrom(h http.Handler, address, path string) (int, string) {
	w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, path, nil)
	r.RemoteAddr = address
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func TestAdminServer(t *testing.T) {
	api, err := kubeapi.Start(kubeapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	api.PutPod(kubeapi.NewRunningPod("node-1", "ns", "a", map[string]string{"role": "reader"}, "10.0.0.1"))
	client, err := kube.New(&rest.Config{Host: api.URL()})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	for _, debug := range []bool{false, true} {
		o := &options{node: "node-1", debug: debug, rules: roles.Rules{RoleKey: "role", BaseARN: "arn:aws:iam::123456789012:role/", Duration: time.Hour}}
		p := newComponents(o, client, nil, attachment.NewIndex(attachment.In(t.TempDir())), log)
		h := adminServer(p, o, log).Handler
		if status, _ := get(h, "/healthz"); status != http.StatusServiceUnavailable {
			t.Errorf("before the pods are known: %d", status)
		}
		if status, body := get(h, "/metrics"); status != 200 || !strings.Contains(body, "kube2iam_info") {
			t.Errorf("metrics: %d %s", status, body)
		}
		if status, _ := get(h, "/latest/meta-data/iam/security-credentials/"); status != 404 {
			t.Errorf("metadata on the metrics port: %d", status)
		}
		if status, _ := get(h, "/debug/store"); (status == 200) != debug {
			t.Errorf("debug %v: /debug/store %d", debug, status)
		}
		if status, _ := getFrom(h, "10.244.0.5:4711", "/debug/store"); status != 404 {
			t.Errorf("debug %v: /debug/store for a pod: %d", debug, status)
		}
	}
}
