package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// Sandbox is a pod as the container runtime sees it: a network namespace and the pod's identity.
type Sandbox struct {
	Namespace, Name, UID string
	ContainerID          string
	Netns                *netnstest.Namespace

	// IP and Result are results of ADD. If IP is set before ADD, host-local is asked for it.
	IP     netip.Addr
	Result *types100.Result
}

// NewSandbox makes a sandbox without network interfaces.
func (b *Bed) NewSandbox(namespace, name, uid string) (*Sandbox, error) {
	b.mu.Lock()
	b.sandboxes++
	id := fmt.Sprintf("%064x", b.sandboxes) // as long as containerd's
	b.mu.Unlock()
	n, err := b.newNetns("cni-" + strings.TrimLeft(id, "0"))
	if err != nil {
		return nil, err
	}
	return &Sandbox{Namespace: namespace, Name: name, UID: uid, ContainerID: id, Netns: n}, nil
}

// Runtime returns the parameters that containerd passes to libcni for the sandbox.
func (s *Sandbox) Runtime() *libcni.RuntimeConf {
	args := [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", s.Namespace},
		{"K8S_POD_NAME", s.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", s.ContainerID},
		{"K8S_POD_UID", s.UID},
	}
	if s.IP.IsValid() && s.Result == nil {
		args = append(args, [2]string{"IP", s.IP.String()})
	}
	return &libcni.RuntimeConf{ContainerID: s.ContainerID, NetNS: s.Netns.Path(), IfName: "eth0", Args: args}
}

// Add runs CNI ADD with the current conflist, as the runtime does. It does not clean up after an
// error.
func (b *Bed) Add(ctx context.Context, s *Sandbox) error {
	list, err := b.network()
	if err != nil {
		return err
	}
	rt := s.Runtime()
	return b.Node.Do(func() error {
		result, err := b.cni.AddNetworkList(ctx, list, rt)
		if err != nil {
			return err
		}
		if s.Result, err = types100.GetResult(result); err != nil {
			return err
		}
		if len(s.Result.IPs) == 0 {
			return errors.New("ADD gave no IP")
		}
		ip, _ := netip.AddrFromSlice(s.Result.IPs[0].Address.IP)
		s.IP = ip.Unmap()
		return nil
	})
}

// AddSecond adds the interface net1 on the second network and returns its address.
func (b *Bed) AddSecond(ctx context.Context, s *Sandbox) (netip.Addr, error) {
	list, rt, err := b.secondNetwork(s)
	if err != nil {
		return netip.Addr{}, err
	}
	var ip netip.Addr
	err = b.Node.Do(func() error {
		added, err := b.cni.AddNetworkList(ctx, list, rt)
		if err != nil {
			return err
		}
		result, err := types100.GetResult(added)
		if err == nil {
			ip, _ = netip.AddrFromSlice(result.IPs[0].Address.IP)
			ip = ip.Unmap()
		}
		return err
	})
	return ip, err
}

// DelSecond removes the interface net1.
func (b *Bed) DelSecond(ctx context.Context, s *Sandbox) error {
	list, rt, err := b.secondNetwork(s)
	if err != nil {
		return err
	}
	return b.Node.Do(func() error { return b.cni.DelNetworkList(ctx, list, rt) })
}

func (b *Bed) secondNetwork(s *Sandbox) (*libcni.NetworkConfigList, *libcni.RuntimeConf, error) {
	b.mu.Lock()
	chain := b.chained()
	b.mu.Unlock()
	data, err := b.second(chain)
	if err != nil {
		return nil, nil, err
	}
	list, err := libcni.ConfListFromBytes(data)
	rt := s.Runtime()
	rt.IfName = "net1"
	return list, rt, err
}

// AddAgain repeats ADD of the plugins after the primary one with another prevResult.
func (b *Bed) AddAgain(ctx context.Context, s *Sandbox, prevResult *types100.Result) error {
	return b.CallOurs(ctx, "ADD", s, prevResult)
}

// CallOurs calls the plugins after the primary one only.
func (b *Bed) CallOurs(ctx context.Context, command string, s *Sandbox, prevResult *types100.Result) error {
	list, err := b.network()
	if err != nil {
		return err
	}
	rt := s.Runtime()
	args := &invoke.Args{
		Command: command, ContainerID: rt.ContainerID, NetNS: rt.NetNS, IfName: rt.IfName, PluginArgs: rt.Args,
		Path: strings.Join(b.tools, string(filepath.ListSeparator)),
	}
	return b.Node.Do(func() error {
		for _, plugin := range list.Plugins[1:] {
			inject := map[string]any{"name": list.Name, "cniVersion": list.CNIVersion}
			if prevResult != nil {
				inject["prevResult"] = prevResult
			}
			conf, err := libcni.InjectConf(plugin, inject)
			if err != nil {
				return err
			}
			binary, err := b.tools.Path(plugin.Network.Type)
			if err != nil {
				return err
			}
			if command == "ADD" {
				_, err = invoke.ExecPluginWithResult(ctx, binary, conf.Bytes, args, nil)
			} else {
				err = invoke.ExecPluginWithoutResult(ctx, binary, conf.Bytes, args, nil)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// Del runs CNI DEL with the current conflist. The caller may have changed the result of Runtime.
func (b *Bed) Del(ctx context.Context, rt *libcni.RuntimeConf) error {
	list, err := b.network()
	if err != nil {
		return err
	}
	return b.Node.Do(func() error { return b.cni.DelNetworkList(ctx, list, rt) })
}

// Check runs CNI CHECK.
func (b *Bed) Check(ctx context.Context, s *Sandbox) error {
	list, err := b.network()
	if err != nil {
		return err
	}
	return b.Node.Do(func() error { return b.cni.CheckNetworkList(ctx, list, s.Runtime()) })
}

// GC runs CNI GC. valid are the sandboxes that still exist.
func (b *Bed) GC(ctx context.Context, valid ...*Sandbox) error {
	list, err := b.network()
	if err != nil {
		return err
	}
	args := &libcni.GCArgs{}
	for _, s := range valid {
		args.ValidAttachments = append(args.ValidAttachments, cnitypes.GCAttachment{ContainerID: s.ContainerID, IfName: "eth0"})
	}
	return b.Node.Do(func() error { return b.cni.GCNetworkList(ctx, list, args) })
}

// Status runs CNI STATUS.
func (b *Bed) Status(ctx context.Context) error {
	list, err := b.network()
	if err != nil {
		return err
	}
	return b.Node.Do(func() error { return b.cni.GetStatusNetworkList(ctx, list) })
}

// RunPod does the work of API server, scheduler, kubelet and runtime: it assigns the pod to the
// node, makes its sandbox, runs ADD, and sets the pod's status to Running. If ADD fails, it runs
// DEL, as the runtime does.
func (b *Bed) RunPod(ctx context.Context, namespace, name string, annotations map[string]string) (*Sandbox, error) {
	pod := b.KubeAPI.PutPod(kubeapi.NewPod(NodeName, namespace, name, annotations))
	s, err := b.NewSandbox(namespace, name, string(pod.UID))
	if err != nil {
		return nil, err
	}
	if err := b.Add(ctx, s); err != nil {
		return nil, errors.Join(fmt.Errorf("pod %s/%s: %w", namespace, name, err), b.Del(ctx, s.Runtime()))
	}
	return s, b.KubeAPI.SetStatus(namespace, name, corev1.PodRunning, s.IP.String())
}

// StopPod runs DEL, removes the sandbox, and deletes the pod from the API server.
func (b *Bed) StopPod(ctx context.Context, s *Sandbox) error {
	if err := b.Del(ctx, s.Runtime()); err != nil {
		return err
	}
	if err := s.Netns.Close(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return b.KubeAPI.DeletePod(s.Namespace, s.Name)
}
