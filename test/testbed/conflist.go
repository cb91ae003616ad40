package testbed

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
)

// Network is the name of the network in the conflist.
const Network = "testbed"

// Entry is the configuration of a plugin in the conflist.
type Entry map[string]any

// Kube2IAM returns the entry of kube2iam-cni with a backend. The testbed sets its state directory.
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

// SetChain replaces the plugins after the primary one and returns the previous ones. As with
// containerd, calls for existing pods use the new conflist.
func (b *Bed) SetChain(chain ...Entry) []Entry {
	b.mu.Lock()
	before := b.chain
	b.chain = chain
	b.mu.Unlock()
	b.writeConflist() // for the agent; the next call of a plugin writes it again and reports errors
	return before
}

// primaryEntry returns the entry of the primary plugin with host-local IPAM.
func (b *Bed) primaryEntry() (Entry, error) {
	return b.entryOf(b.primary)
}

func (b *Bed) entryOf(plugin string) (Entry, error) {
	ranges := [][]map[string]string{{{"subnet": podSubnet}}}
	routes := []map[string]string{{"dst": "0.0.0.0/0"}}
	if b.ipv6 {
		ranges = append(ranges, []map[string]string{{"subnet": podSubnet6}})
		routes = append(routes, map[string]string{"dst": "::/0"})
	}
	e := Entry{"type": plugin}
	switch plugin {
	case "bridge":
		e["bridge"], e["isGateway"] = "cni0", true
	case "macvlan", "ipvlan":
		e["master"], e["mode"] = LAN, map[string]string{"macvlan": "bridge", "ipvlan": "l2"}[plugin]
		ranges = [][]map[string]string{{{"subnet": lanSubnet, "gateway": LANIP.String()}}}
	case "ptp", "calicolike":
	case "netkitlike":
		e["type"], e["device"] = "calicolike", "netkit"
	default:
		return nil, fmt.Errorf("primary plugin %q: none that the testbed knows", plugin)
	}
	e["ipam"] = map[string]any{"type": "host-local", "ranges": ranges, "routes": routes, "dataDir": filepath.Join(b.Dir, "ipam")}
	return e, nil
}

// Second is the name of a second network, on which a pod may have another interface.
const Second = "second"

// second returns the conflist of the second network: ptp, and kube2iam-cni as in the first network.
func (b *Bed) second(chain []Entry) ([]byte, error) {
	ptp := Entry{"type": "ptp", "ipam": map[string]any{
		"type": "host-local", "ranges": [][]map[string]string{{{"subnet": secondSubnet}}}, "dataDir": filepath.Join(b.Dir, "ipam"),
	}}
	return json.MarshalIndent(map[string]any{"cniVersion": "1.1.0", "name": Second, "plugins": append([]Entry{ptp}, chain...)}, "", "  ")
}

const secondSubnet = "10.203.0.0/24"

// Conflist returns the current conflist.
func (b *Bed) Conflist() ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	primary, err := b.primaryEntry()
	if err != nil {
		return nil, err
	}
	plugins := append([]Entry{primary}, b.chained()...)
	return json.MarshalIndent(map[string]any{"cniVersion": "1.1.0", "name": Network, "plugins": plugins}, "", "  ")
}

// chained returns the plugins after the primary one, with the state directory set.
func (b *Bed) chained() []Entry {
	var chain []Entry
	for _, e := range b.chain {
		if e["type"] == "kube2iam-cni" && e["stateDir"] == nil {
			e = maps.Clone(e)
			e["stateDir"] = b.StateDir
		}
		chain = append(chain, e)
	}
	return chain
}

// confDir returns the directory that is /etc/cni/net.d on a node.
func (b *Bed) confDir() string { return filepath.Join(b.Dir, "net.d") }

func (b *Bed) writeConflist() ([]byte, error) {
	data, err := b.Conflist()
	if err != nil {
		return nil, err
	}
	return data, os.WriteFile(filepath.Join(b.confDir(), "10-testbed.conflist"), data, 0o644)
}

// network reads the conflist as a runtime does.
func (b *Bed) network() (*libcni.NetworkConfigList, error) {
	data, err := b.writeConflist()
	if err != nil {
		return nil, err
	}
	return libcni.ConfListFromBytes(data)
}
