package testbed

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
)

// Network is the network's name in the conflist.
const Network = "testbed"

// Entry is a plugin's part of the conflist.
type Entry map[string]any

// Kube2IAM is kube2iam-cni's entry with a backend; the testbed's state directory is filled in where it says no other.
func Kube2IAM(backend string) Entry {
	return Entry{
		"type":       "kube2iam-cni",
		"proxyIP":    "auto",
		"proxyPort":  8181,
		"metadataIP": "169.254.169.254",
		"backend":    backend,
		"guard":      true,
	}
}

// SetChain changes what follows the primary plugin in the conflist. As with containerd, calls for pods that are there
// already go by the new one.
func (b *Bed) SetChain(chain ...Entry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.chain = chain
}

// primaryEntry is the real bridge or ptp plugin with real host-local IPAM.
func (b *Bed) primaryEntry() (Entry, error) {
	e := Entry{
		"type": b.primary,
		"ipam": map[string]any{
			"type":    "host-local",
			"ranges":  [][]map[string]string{{{"subnet": podSubnet}}},
			"routes":  []map[string]string{{"dst": "0.0.0.0/0"}},
			"dataDir": filepath.Join(b.Dir, "ipam"),
		},
	}
	switch b.primary {
	case "bridge":
		e["bridge"], e["isGateway"] = "cni0", true
	case "ptp":
	default:
		return nil, fmt.Errorf("primary plugin %q: neither bridge nor ptp", b.primary)
	}
	return e, nil
}

// Conflist is the present configuration, as it would stand in /etc/cni/net.d.
func (b *Bed) Conflist() ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	primary, err := b.primaryEntry()
	if err != nil {
		return nil, err
	}
	plugins := []Entry{primary}
	for _, e := range b.chain {
		if e["type"] == "kube2iam-cni" && e["stateDir"] == nil {
			e = maps.Clone(e)
			e["stateDir"] = b.StateDir
		}
		plugins = append(plugins, e)
	}
	return json.MarshalIndent(map[string]any{"cniVersion": "1.1.0", "name": Network, "plugins": plugins}, "", "  ")
}

// network reads the conflist as a runtime does. The file stays in the testbed's directory for whoever wants to look.
func (b *Bed) network() (*libcni.NetworkConfigList, error) {
	data, err := b.Conflist()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(b.Dir, "conf", "10-testbed.conflist"), data, 0o644); err != nil {
		return nil, err
	}
	return libcni.ConfListFromBytes(data)
}
