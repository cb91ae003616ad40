package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Cache is what container runtimes remember of each live attachment by way of libcni (libcni/api.go, cachedInfo), in a
// directory that only root can write.
type Cache struct {
	// Dir is libcni's cache; its entries are in results/.
	Dir string
	// NetnsDirs are where the runtimes hold their pods' network namespaces. They are searched for pods whose entry does not
	// name it, as those of libcni before 1.3 do not.
	NetnsDirs []string
	// Holds tells whether an interface in a network namespace holds an address.
	Holds func(netnsPath, ifName string, ip netip.Addr) bool
	// HostLink is the name of the host side of an interface in a network namespace; empty where there is none.
	HostLink func(netnsPath, ifName string) string
	// Pod reads the pod from an entry's arguments.
	Pod func(args string) (attachment.Pod, error)
}

// entry is what is read of a cached attachment.
type entry struct {
	Kind        string          `json:"kind"`
	ContainerID string          `json:"containerId"`
	IfName      string          `json:"ifName"`
	NetworkName string          `json:"networkName"`
	NetNS       string          `json:"netns"`
	CniArgs     [][2]string     `json:"cniArgs"`
	Result      json.RawMessage `json:"result"`
}

const (
	cacheKind = "cniCacheV1"
	maxEntry  = 1 << 20
)

// Attachments are the cached attachments of pods whose network namespace is there and whose interface holds one of the
// addresses. Entries that cannot be read are in the error; the others come with it all the same. An entry that is no pod's
// is passed over, and so are those whose namespace could be several pods'.
//
// What an interface holds is the pod's own word, if it has NET_ADMIN: one could take the address of a pod that is no more, and
// be taken for it. So a namespace that the entry does not name must have the entry's host interface, too, which no pod
// chooses; where the result names none, the pod is not adopted.
func (c Cache) Attachments() ([]Request, error) {
	dir := filepath.Join(c.Dir, "results")
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var requests []cached
	var errs []error
	for _, f := range files {
		r, err := c.read(filepath.Join(dir, f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // its DEL came
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.Name(), err))
			continue
		}
		if r != nil {
			requests = append(requests, *r)
		}
	}
	return c.unique(c.located(requests)), errors.Join(errs...)
}

// cached is an entry that could be a pod's, and the interfaces on the host that its result names.
type cached struct {
	Request
	hostLinks []string
}

func (c Cache) read(path string) (*cached, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxEntry))
	if err != nil {
		return nil, err
	}
	var e entry
	if json.Unmarshal(data, &e) != nil || e.Kind != cacheKind {
		return nil, nil // of an older libcni, which says nothing of the pod, or being written
	}
	var args []string
	for _, pair := range e.CniArgs {
		args = append(args, pair[0]+"="+pair[1])
	}
	pod, err := c.Pod(strings.Join(args, ";"))
	if err != nil || pod == (attachment.Pod{}) {
		return nil, err
	}
	if err := attachment.Valid(e.ContainerID, e.IfName); err != nil {
		return nil, err
	}
	version, err := create.DecodeVersion(e.Result)
	if err != nil {
		return nil, err
	}
	given, err := create.Create(version, e.Result)
	if err != nil {
		return nil, err
	}
	result, err := types100.NewResultFromResult(given)
	if err != nil {
		return nil, err
	}
	ips, err := ResultIPs(result)
	if err != nil || len(ips) == 0 {
		return nil, err
	}
	one := &cached{Request: Request{ContainerID: e.ContainerID, IfName: e.IfName, Netns: e.NetNS, Network: e.NetworkName, Pod: pod, IPs: ips}}
	for _, i := range result.Interfaces {
		if i.Sandbox == "" {
			one.hostLinks = append(one.hostLinks, i.Name)
		}
	}
	return one, nil
}

// ResultIPs are the addresses of a plugin's result, of whichever version.
func ResultIPs(result types.Result) ([]netip.Addr, error) {
	latest, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, err
	}
	var ips []netip.Addr
	for _, config := range latest.IPs {
		ip, _ := netip.AddrFromSlice(config.Address.IP)
		ips = append(ips, ip.Unmap())
	}
	return ips, nil
}

// located keeps those whose namespace is known, or the only one whose interface holds one of the addresses.
func (c Cache) located(requests []cached) []Request {
	var located []Request
	var candidates []string
	searched := false
	for _, r := range requests {
		if r.Netns == "" {
			if !searched {
				candidates, searched = c.namespaces(), true
			}
			fitting := slices.DeleteFunc(slices.Clone(candidates), func(path string) bool {
				return !c.holdsOne(path, r.Request) || !slices.Contains(r.hostLinks, c.HostLink(path, r.IfName))
			})
			if len(fitting) != 1 {
				continue
			}
			r.Netns = fitting[0]
		} else if !c.holdsOne(r.Netns, r.Request) {
			continue
		}
		located = append(located, r.Request)
	}
	return located
}

func (c Cache) holdsOne(path string, r Request) bool {
	return slices.ContainsFunc(r.IPs, func(ip netip.Addr) bool { return c.Holds(path, r.IfName, ip) })
}

func (c Cache) namespaces() []string {
	var paths []string
	for _, dir := range c.NetnsDirs {
		files, _ := os.ReadDir(dir)
		for _, f := range files {
			paths = append(paths, filepath.Join(dir, f.Name()))
		}
	}
	return paths
}

// unique drops those of whom two claim one interface of one namespace: at most one of them still lives, and nothing says
// which.
func (c Cache) unique(requests []Request) []Request {
	claims := make(map[[2]string]int)
	for _, r := range requests {
		claims[[2]string{r.Netns, r.IfName}]++
	}
	return slices.DeleteFunc(requests, func(r Request) bool { return claims[[2]string{r.Netns, r.IfName}] > 1 })
}
