package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
)

func TestGC(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		n.Must(n.add(n.Args("c1", n.Pod, pod4)))
		n.Must(n.add(n.Args("c2", n.NewPod(n.Kind, "veth1", "10.1.0.7", "fd00:1::7"), "10.1.0.7")))
		args := n.Args("c3", n.NewPod(n.Kind, "veth2", "10.1.0.8", "fd00:1::8"), "10.1.0.8")
		args.StdinData = n.Conf(map[string]any{"name": "other", "prevResult": decode(t, args.StdinData).(map[string]any)["prevResult"]})
		n.Must(n.add(args))
		all := n.State()

		gc := func(more map[string]any) error { return n.gc(&skel.CmdArgs{StdinData: n.Conf(more)}) }
		const valid = "cni.dev/valid-attachments"
		wantCode(t, gc(nil), types.ErrInvalidNetworkConfig, valid)
		n.Must(gc(map[string]any{valid: []types.GCAttachment{{ContainerID: "c1", IfName: "eth0"}, {ContainerID: "c2", IfName: "eth0"}}}))
		if diff := cmp.Diff(all, n.State()); diff != "" {
			t.Error(diff)
		}
		n.Must(gc(map[string]any{valid: []types.GCAttachment{{ContainerID: "c1", IfName: "eth0"}, {ContainerID: "c2", IfName: "eth1"}}}))
		if diff := cmp.Diff([]string{"attachments/c1@eth0.json", "attachments/c3@eth0.json", "by-ip/" + pod4, "by-ip/10.1.0.8"}, n.State()); diff != "" {
			t.Error(diff)
		}
		if ours := strings.Join(n.Redirections(), "\n"); strings.Contains(ours, "c2@eth0") || !strings.Contains(ours, "c1@eth0") {
			t.Errorf("got %s", ours)
		}

		// An error with one does not keep the others.
		n.Must(n.add(n.Args("c2", n.Pod, pod4))) // in place of c1
		n.Must(os.WriteFile(filepath.Join(n.StateDir, "attachments", "bad@eth0.json"), []byte("{"), 0o644))
		wantCode(t, gc(map[string]any{valid: nil}), codeGC, "bad@eth0")
		if diff := cmp.Diff([]string{"attachments/bad@eth0.json", "attachments/c3@eth0.json", "by-ip/10.1.0.8"}, n.State()); diff != "" {
			t.Error(diff)
		}
		if n.Backend == "nftables" {
			return
		}
		n.FailCommand(4, "-D KUBE2IAM-CNI")
		wantCode(t, gc(map[string]any{"name": "other", valid: nil}), types.ErrTryAgainLater, "busy")
	})
}
