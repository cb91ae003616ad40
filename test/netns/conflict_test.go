package netns

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestPodsAreAdoptedDuringAConflict has a program that removes the plugin's entry from the network
// configuration whenever the agent has added it. The agent stops adding it, and adopts the pods that
// start without the plugin.
func TestPodsAreAdoptedDuringAConflict(t *testing.T) {
	onThese(t, []setup{routed}, func(t *testing.T, n *node) {
		n.SetChain()
		n.proxy(impatient...)
		agent, err := n.StartAgent("--install", "--cni-bin-dir", t.TempDir())
		n.must(err)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for ; ctx.Err() == nil; time.Sleep(time.Millisecond) {
				files, _ := filepath.Glob(filepath.Join(n.Dir, "net.d", "*"))
				for _, file := range files {
					if text, _ := os.ReadFile(file); bytes.Contains(text, []byte("kube2iam-cni")) {
						n.SetChain()
					}
				}
			}
		}()
		n.eventually(func() bool { return strings.Contains(agent.Log(), "another program removes the entry") })
		pod := n.run("pod", "app")
		n.eventually(func() bool { return n.get(pod, credentials).status == http.StatusOK })
		n.wantOwn(pod, "app")
		n.must(agent.Stop())
		cancel()
		<-ended
		n.wantOnlyTheNodeAsked()
	})
}
