package netns

import (
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
)

// onNode runs a real command on the node.
func (n *node) onNode(command string) string {
	n.t.Helper()
	words := strings.Fields(command)
	out, err := n.Node.Run(n.t.Context(), n.ClientEnv(), words[0], words[1:]...)
	n.must(err)
	return out
}

// flush removes the redirections, as "iptables -t nat -F" does.
func (n *node) flush() {
	n.t.Helper()
	if n.backend != "nftables" {
		n.onNode(n.backend + " -t nat -F")
		return
	}
	for _, m := range []string{"routed", "bridged"} {
		if strings.Contains(n.onNode("nft list maps ip"), "map "+m) { // no pod was attached since the flush
			n.onNode("nft flush map ip kube2iam-cni " + m)
		}
	}
}

// flushAll removes all rules of the node.
func (n *node) flushAll() {
	n.t.Helper()
	n.onNode("nft flush ruleset")
	for _, table := range strings.Fields(n.onNode("cat /proc/self/net/ip_tables_names")) {
		n.onNode("iptables-legacy -t " + table + " -F")
		n.onNode("iptables-legacy -t " + table + " -X")
	}
}

// unguardUplinks removes the guard that the agent has put at the node's uplinks.
func (n *node) unguardUplinks() {
	n.t.Helper()
	n.must(n.Node.Do(agent.RemoveUplinks))
}
