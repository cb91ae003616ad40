// Package attachment keeps the records of which pod holds which IP address on this node.
//
// An attachment is one network interface of one container. ADD writes its record before the rules,
// and DEL removes it after them. The proxy reads records to learn which pod holds a source address.
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

// Datapath says how the packets of an attachment enter the host, and so how they are redirected.
type Datapath string

const (
	// DatapathRouted is a veth whose packets enter the host's IP layer by its host side.
	DatapathRouted Datapath = "routed"
	// DatapathBridged is a veth whose host side is a bridge port. The IP layer sees the bridge
	// only.
	DatapathBridged Datapath = "bridged"
	// DatapathPod is an interface whose packets the host's rules do not see. The redirection is
	// inside the pod, and the proxy sees connections that were dialled to it directly.
	DatapathPod Datapath = "pod"
)

// The metadata service's addresses and port (Amazon EC2 User Guide, "Access instance metadata"). A
// configuration can change the IPv4 address only.
var (
	MetadataIPv4 = netip.MustParseAddr("169.254.169.254")
	MetadataIPv6 = netip.MustParseAddr("fd00:ec2::254")
)

// MetadataPort is the metadata service's TCP port.
const MetadataPort = 80

// Pod is the pod of an attachment as the runtime named it in CNI_ARGS. It is empty if the runtime
// named none: then the address belongs to something that is not a pod.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// HostLink is the interface on the host by which the attachment's packets enter. It is empty if
// there is none.
type HostLink struct {
	Name  string `json:"name,omitempty"`
	Index int    `json:"index,omitempty"`
	// Bridge is the bridge that the link is a port of, if any.
	Bridge string `json:"bridge,omitempty"`
}

// Redirect is one redirection of an attachment. It has all that finds its rule again, whatever the
// configuration says then.
type Redirect struct {
	Source   netip.Addr     `json:"source"`   // the pod's address
	Metadata netip.AddrPort `json:"metadata"` // the destination of the connections
	Proxy    netip.AddrPort `json:"proxy"`    // their destination after translation
}

// Record describes one attachment. ContainerID and IfName identify it. The network's name does not:
// a network can be renamed while its pods run (containernetworking/plugins#752).
type Record struct {
	ContainerID string       `json:"containerID"`
	IfName      string       `json:"ifName"`
	Network     string       `json:"network"`
	Netns       string       `json:"netns,omitempty"`
	Pod         Pod          `json:"pod"`
	IPs         []netip.Addr `json:"ips"`
	HostLink    HostLink     `json:"hostLink"`
	Datapath    Datapath     `json:"datapath"`
	Backend     Backend      `json:"backend"`
	Redirects   []Redirect   `json:"redirects"`
	Created     time.Time    `json:"created"`
}

// ID returns the attachment's identity, "<containerID>@<ifName>".
func (r *Record) ID() string { return ID(r.ContainerID, r.IfName) }

// ID returns the identity of the attachment of ifName in containerID. A container ID has no "@"
// (CNI specification, "container ID"), so identities are unique.
func ID(containerID, ifName string) string { return containerID + "@" + ifName }

// maxRecord bounds the size of a record's file. A real record has less than 2 KiB.
const maxRecord = 64 << 10

// Decode returns the record in data, or an error if a field has a value that ADD does not write.
//
// It ignores unknown fields: after a rollback, an older program must serve and remove the pods that
// a newer one attached. A newer program that gives an attachment another meaning uses a new
// value of datapath or backend, which the older one refuses.
func Decode(data []byte) (*Record, error) {
	r := new(Record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, err
	}
	if err := r.Validate(); err != nil {
		return nil, err
	}
	return r, nil
}
