// Package attachment keeps the records of who holds which IP on this node.
//
// The plugin writes one record for each attachment (a container's interface on a network) before it programs any rule, and
// removes it after the rules are gone. The proxy reads them to learn which pod holds a source address now.
package attachment

import (
	"encoding/json"
	"net/netip"
	"time"
)

// Backend is what programs the rules of an attachment.
type Backend string

const (
	// BackendNFTables is nftables by netlink.
	BackendNFTables Backend = "nftables"
	// BackendIPTables is the node's iptables command.
	BackendIPTables Backend = "iptables"
)

// The metadata service's fixed address (Amazon EC2 User Guide, "Access instance metadata") and port. A
// configuration can change the IPv4 address.
const MetadataPort = 80

// MetadataIPv6 is the IPv6 address of the metadata service.
var MetadataIPv6 = netip.MustParseAddr("fd00:ec2::254")

// Datapath says how the packets of an attachment enter the host, and so how its redirection is matched.
type Datapath string

const (
	// DatapathRouted is a veth whose host side is no port of a bridge: its packets enter the host's IP layer by it.
	DatapathRouted Datapath = "routed"
	// DatapathBridged is a veth whose host side is a bridge port: the IP layer sees them arrive by the bridge.
	DatapathBridged Datapath = "bridged"
	// DatapathPod is an interface whose packets the host's rules do not see: the redirection is made inside the pod, and the
	// proxy sees connections that were dialled to it directly.
	DatapathPod Datapath = "pod"
)

// Pod is the pod that an attachment belongs to, as the runtime named it in CNI_ARGS. It is empty where the runtime named
// none: such an address is held by something that is no pod.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// HostLink is the interface on the host that the attachment's packets enter by. It is empty where there is none.
type HostLink struct {
	Name  string `json:"name,omitempty"`
	Index int    `json:"index,omitempty"`
	// Bridge is the name of the bridge that the link is a port of; empty for a routed one.
	Bridge string `json:"bridge,omitempty"`
}

// Redirect is one redirection that was programmed for an attachment: everything needed to find its rule again, whatever
// the configuration says by then.
type Redirect struct {
	// Source is the pod's own address, which the rule matches.
	Source netip.Addr `json:"source"`
	// Metadata is where the redirected connections were bound for.
	Metadata netip.AddrPort `json:"metadata"`
	// Proxy is where they go instead.
	Proxy netip.AddrPort `json:"proxy"`
}

// Record is one attachment. ContainerID and IfName identify it; the network's name does not, because a network can be
// renamed under a running pod (containernetworking/plugins#752).
type Record struct {
	ContainerID string       `json:"containerID"`
	IfName      string       `json:"ifName"`
	Network     string       `json:"network"`
	Netns       string       `json:"netns,omitempty"`
	Pod         Pod          `json:"pod"`
	IPs         []netip.Addr `json:"ips"`
	HostLink    HostLink     `json:"hostLink"`
	Datapath    Datapath     `json:"datapath"`
	// Backend names what programmed the rules ("iptables-nft", "iptables-legacy", "nftables"), so that DEL asks the same one
	// first.
	Backend Backend `json:"backend"`
	// Mark is what iptables matches in place of the bridge's port; 0 where it sees the port, or there is no bridge.
	Mark      uint32     `json:"mark,omitempty"`
	Redirects []Redirect `json:"redirects"`
	Created   time.Time  `json:"created"`
}

// ID is the attachment's identity in one word, "<containerID>@<ifName>". A container ID holds no "@" (CNI specification,
// "container ID"), so two attachments never share one.
func (r *Record) ID() string { return ID(r.ContainerID, r.IfName) }

// ID is the identity of the attachment of ifName in containerID.
func ID(containerID, ifName string) string { return containerID + "@" + ifName }

// maxRecord bounds what is read of one record; a real one has less than 2 KiB.
const maxRecord = 64 << 10

// Decode returns the record that is the content of a file, or an error if a field's value is not one that an ADD writes.
//
// Unknown fields are ignored: after a rollback, an older program must still serve and remove the pods that a newer one
// attached. A newer program that gives an attachment another meaning must say so in a known field (path, backend), because
// an older program refuses the values there that it does not know.
func Decode(data []byte) (*Record, error) {
	r := new(Record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, err
	}
	if err := r.validate(); err != nil {
		return nil, err
	}
	return r, nil
}
