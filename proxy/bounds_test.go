package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"
)

func TestPodServerLimits(t *testing.T) {
	s := podServer(nil, slog.New(slog.DiscardHandler))
	if s.ReadTimeout <= 0 || s.IdleTimeout <= 0 || s.MaxHeaderBytes <= 0 || s.MaxHeaderBytes > 64<<10 || s.ConnContext == nil {
		t.Errorf("%+v", s)
	}
}

// TestManifestDeniesUserData parses the proxy's arguments in the manifest.
func TestManifestDeniesUserData(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "conf", "kustomize", "proxy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var set appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(text, &set); err != nil {
		t.Fatal(err)
	}
	args := set.Spec.Template.Spec.Containers[0].Args
	o, err := parseOptions(args)
	if err != nil {
		t.Fatal(err)
	}
	denied := func(path string) bool {
		for _, d := range o.metadataDeny {
			if d.MatchString(path) {
				return true
			}
		}
		return false
	}
	if !denied("/latest/user-data") || !denied("/2021-07-15/user-data") || denied("/latest/meta-data/instance-id") {
		t.Errorf("%v deny %v", args, o.metadataDeny)
	}
}
