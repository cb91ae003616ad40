// Package testbed builds a node with pods in network namespaces of its own: the node, whose
// interface leads to an "aws" namespace with Amazon's metadata mock at 169.254.169.254 and
// stand-ins for STS and the Kubernetes API, and pods that real CNI plugins connect. The demo, the
// namespace suite and the benchmark all run on it.
//
//	aws namespace                              node namespace                    a namespace for each pod
//	169.254.169.254:80  tap ─ metadata mock    default route ─▶ aws              eth0 10.201.0.x
//	10.200.0.1:4566     STS                    eth0 10.200.0.2                   default route ─▶ node
//	10.200.0.1:6443     Kubernetes API         bridge or veths, the proxy
//
// The node forwards and does not masquerade: the metadata mock sees a pod's own address, and
// answers it.
package testbed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/imdstap"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
)

// Names and addresses that are the same in every testbed.
const (
	NodeName = "node1"
	Account  = "123456789012"
	Region   = "us-east-1"
	// RoleBase is the prefix of a role's ARN, as in --base-role-arn.
	RoleBase = "arn:aws:iam::" + Account + ":role/"
	// NodeRole is the role of the node itself, whose credentials no pod may get.
	NodeRole = "node"
	// MetadataAddr is the address of the metadata service.
	MetadataAddr = "169.254.169.254:80"

	stsAddr     = "10.200.0.1:4566"
	kubeAPIAddr = "10.200.0.1:6443"
	podSubnet   = "10.201.0.0/24"
	podSubnet6  = "fd00:201::/64"
	lanSubnet   = "10.202.0.0/24"

	// MetadataAddr6 is the IPv6 address of the metadata service.
	MetadataAddr6 = "[fd00:ec2::254]:80"
)

// NodeIP is the node's address, and AWSIP the address of its default gateway. Pods have addresses
// of PodSubnet. Pods on macvlan and ipvlan have addresses of LANSubnet, the network of the node's
// second interface. Its gateway LANIP is not the node.
var (
	NodeIP     = netip.MustParseAddr("10.200.0.2")
	NodeIP6    = netip.MustParseAddr("fd00:200::2")
	AWSIP      = netip.MustParseAddr("10.200.0.1")
	AWSIP6     = netip.MustParseAddr("fd00:200::1")
	LANIP      = netip.MustParseAddr("10.202.0.1")
	PodSubnet  = netip.MustParsePrefix(podSubnet)
	PodSubnet6 = netip.MustParsePrefix(podSubnet6)
	LANSubnet  = netip.MustParsePrefix(lanSubnet)
)

// Options of a Bed.
type Options struct {
	// Tools are the programs that BuildTools has built.
	Tools Tools
	// Primary is the CNI plugin that connects the pods: "bridge", "ptp", "macvlan", "ipvlan",
	// "calicolike" (test/calicolike), or "netkitlike" (test/calicolike on netkit devices).
	Primary string
	// IPv6 adds addresses of that family to the node and to pods.
	IPv6 bool
	// Chain is the rest of the conflist after the primary plugin.
	Chain []Entry
	// NoBridgeNF hides the frames of a bridge from iptables, as on nodes without the kernel module
	// br_netfilter. Otherwise New loads the module and disables it for the host's own bridges.
	NoBridgeNF bool
}

// Bed is a node, its pods and the services that they use.
type Bed struct {
	// Dir contains all files of the testbed, including the state directory. It is on a tmpfs if
	// /run is.
	Dir      string
	StateDir string

	Node, AWS *netnstest.Namespace
	KubeAPI   *kubeapi.Server
	STS       *sts.Server
	IMDS      *imdstap.Tap
	IMDS6     *imdstap.Tap // nil without IPv6

	tools Tools
	cni   *libcni.CNIConfig

	stsAhead atomic.Int64 // nanoseconds

	mu        sync.Mutex
	primary   string
	ipv6      bool
	chain     []Entry
	netns     []*netnstest.Namespace
	processes []*Process
	sandboxes int
}

// dirPattern is the prefix of a testbed's directory. The process ID follows, by which the next
// testbed finds the directories of killed processes.
const dirPattern = "/run/kube2iam-cni-testbed."

// New builds a node without pods. After an error it leaves nothing behind.
func New(ctx context.Context, o Options) (_ *Bed, err error) {
	if err := Require("ip"); err != nil {
		return nil, err
	}
	sweep()
	dir, err := os.MkdirTemp(filepath.Dir(dirPattern), filepath.Base(dirPattern)+strconv.Itoa(os.Getpid())+".")
	if err != nil {
		return nil, fmt.Errorf("testbed: %w", err)
	}
	b := &Bed{Dir: dir, StateDir: filepath.Join(dir, "state"), tools: o.Tools, primary: o.Primary, ipv6: o.IPv6, chain: o.Chain}
	defer func() {
		if err != nil {
			err = fmt.Errorf("testbed: %w", errors.Join(err, b.Close()))
		}
	}()
	for _, sub := range []string{"netns", "home", "ipam", "cni", "conf", "net.d"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	b.cni = libcni.NewCNIConfigWithCacheDir(b.tools, filepath.Join(dir, "cni"), nil)
	if err := b.connect(o.Primary == "bridge" && !o.NoBridgeNF); err != nil {
		return nil, err
	}
	if err := b.serve(ctx); err != nil {
		return nil, err
	}
	return b, nil
}

// serve starts the services that the node and the pods use.
func (b *Bed) serve(ctx context.Context) (err error) {
	if b.KubeAPI, err = kubeapi.Start(kubeapi.Options{Address: kubeAPIAddr, Listen: b.AWS.Listen, TLS: true}); err != nil {
		return err
	}
	if b.STS, err = sts.Start(sts.Options{Address: stsAddr, Listen: b.AWS.Listen, Now: b.stsTime}); err != nil {
		return err
	}
	b.STS.PutPrincipal(nodePrincipal)
	return b.serveMetadata(ctx)
}

// SetSTSClock sets the clock of STS ahead of the node's.
func (b *Bed) SetSTSClock(ahead time.Duration) { b.stsAhead.Store(int64(ahead)) }

func (b *Bed) stsTime() time.Time { return time.Now().Add(time.Duration(b.stsAhead.Load())) }

// PutRole makes a role that the node may assume for its pods, and returns its ARN. If externalID is
// not empty, AssumeRole must name it.
func (b *Bed) PutRole(name, externalID string) string {
	arn := RoleBase + name
	b.STS.PutRole(sts.Role{ARN: arn, Trusts: []string{RoleBase + NodeRole}, ExternalID: externalID})
	return arn
}

// Leaks returns the requests for credentials that reached the metadata service, except those of the
// proxy for the node's own. The proxy uses the AWS SDK, which is recognised by its User-Agent.
func (b *Bed) Leaks() []imdstap.Request {
	var leaks []imdstap.Request
	asked := b.IMDS.CredentialRequests()
	if b.IMDS6 != nil {
		asked = append(asked, b.IMDS6.CredentialRequests()...)
	}
	for _, r := range asked {
		own := strings.TrimSuffix(r.URI, NodeRole) == credentialsPath && strings.HasPrefix(r.UserAgent, "aws-sdk-go/")
		if r.Source != NodeIP || !own {
			leaks = append(leaks, r)
		}
	}
	return leaks
}

// ClientEnv returns the whole environment of an AWS client in a pod. It contains neither
// credentials nor the address of the metadata service.
func (b *Bed) ClientEnv() []string {
	return []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + filepath.Join(b.Dir, "home"),
		"AWS_REGION=" + Region,
		"AWS_DEFAULT_REGION=" + Region,
	}
}

func (b *Bed) newNetns(name string) (*netnstest.Namespace, error) {
	n, err := netnstest.CreateAt(filepath.Join(b.Dir, "netns", name))
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.netns = append(b.netns, n)
	return n, nil
}

// start starts a program that Close stops.
func (b *Bed) start(n *netnstest.Namespace, env []string, name string, args ...string) (*Process, error) {
	p, err := startProcess(n, env, name, args...)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.processes = append(b.processes, p)
	return p, nil
}

// Close ends every process, server and namespace of the testbed and removes its directory. A second
// call does nothing.
func (b *Bed) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.processes {
		p.Kill()
	}
	for _, tap := range []*imdstap.Tap{b.IMDS, b.IMDS6} {
		if tap != nil {
			tap.Close()
		}
	}
	if b.STS != nil {
		b.STS.Close()
	}
	if b.KubeAPI != nil {
		b.KubeAPI.Close()
	}
	if b.Node != nil {
		// An agent that was killed leaves its lock file, and each agent the pins of the uplinks' guard.
		// Both are named by the node's network namespace.
		var st unix.Stat_t
		if unix.Stat(b.Node.Path(), &st) == nil {
			os.Remove(fmt.Sprintf("/run/kube2iam-cni-agent-%d.lock", st.Ino))
			os.RemoveAll(fmt.Sprintf("/sys/fs/bpf/kube2iam-cni-%d", st.Ino))
		}
	}
	var errs []error
	for _, n := range b.netns {
		errs = append(errs, n.Close())
	}
	b.processes, b.netns = nil, nil
	return errors.Join(append(errs, os.RemoveAll(b.Dir))...)
}

// sweep removes the directories of testbeds whose process has ended. Their child processes ended
// with them.
func sweep() {
	dirs, _ := filepath.Glob(dirPattern + "*")
	for _, dir := range dirs {
		pid, err := strconv.Atoi(strings.SplitN(strings.TrimPrefix(dir, dirPattern), ".", 2)[0])
		if err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		held, _ := filepath.Glob(filepath.Join(dir, "netns", "*"))
		for _, path := range held {
			unix.Unmount(path, unix.MNT_DETACH)
		}
		os.RemoveAll(dir)
	}
}
