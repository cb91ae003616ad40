package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
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
	// Addresses are those of an interface in a network namespace; none where it is not there.
	Addresses func(netnsPath, ifName string) ([]netip.Addr, error)
	// HostLink is the name of the host side of an interface in a network namespace; empty where there is none.
	HostLink func(netnsPath, ifName string) string
	// Pod reads the pod from an entry's arguments.
	Pod func(args string) (attachment.Pod, error)
	// Chained are the names of the networks that the plugin is chained in by now, as far as the node's configurations say.
	Chained func() ([]string, error)
	// Is tells whether a network's configuration has the plugin in its chain.
	Is func(config []byte) bool
}

// entry is what is read of a cached attachment.
type entry struct {
	Kind        string          `json:"kind"`
	ContainerID string          `json:"containerId"`
	IfName      string          `json:"ifName"`
	NetworkName string          `json:"networkName"`
	NetNS       string          `json:"netns"`
	CniArgs     [][2]string     `json:"cniArgs"`
	Config      []byte          `json:"config"`
	Result      json.RawMessage `json:"result"`
}

const (
	cacheKind = "cniCacheV1"
	maxEntry  = 1 << 20
)

// Attachments are the cached attachments of pods that are not on record, whose network the plugin is chained in, whose network
// namespace is there and whose interface holds one of the addresses. Entries that cannot be read are in the error, and networks
// that are left out; the others come with it all the same. An entry that is no pod's is passed over, and so are those whose
// namespace could be several pods'.
//
// A pod with NET_ADMIN chooses its addresses and can replace its interface, and the path /proc/PID/ns/net leads to another pod once
// the PID is reused. Neither chooses the host interface, so an entry whose result names host interfaces is only adopted if the
// interface leads to one of them. An entry that names neither them nor the namespace is not adopted.
//
// Where all are on record no namespace is looked into, and else each at most once for each name of an interface.
func (c Cache) Attachments(records []*attachment.Record) ([]cached, error) {
	entries, err := c.entries()
	errs := []error{err}
	attached := make(map[string]*attachment.Record, len(records))
	for _, r := range records {
		attached[r.ID()] = r
	}
	chained, err := c.chained(records, entries)
	errs = append(errs, err)
	// Of two that claim one interface of one namespace at most one still lives, and nothing says which.
	claims := make(map[place]int)
	var unknown []cached
	for _, e := range entries {
		if r := attached[attachment.ID(e.ContainerID, e.IfName)]; r != nil {
			claims[place{r.Netns, r.IfName}]++
		} else {
			unknown = append(unknown, e)
		}
	}
	located, err := c.located(unknown)
	errs = append(errs, err)
	for _, r := range located {
		claims[place{r.Netns, r.IfName}]++
	}
	var requests []cached
	left := make(map[string]bool)
	for _, r := range located {
		if chained[r.Network] && claims[place{r.Netns, r.IfName}] == 1 {
			requests = append(requests, r)
		}
		left[r.Network] = !chained[r.Network]
	}
	for _, network := range slices.Sorted(maps.Keys(left)) {
		if left[network] {
			errs = append(errs, fmt.Errorf("network %q: the plugin is not chained in it, and its pods stay refused", network))
		}
	}
	return requests, errors.Join(errs...)
}

// Through is how many of the cached attachments have the plugin in their chain, as the runtime had it then: some call its DEL, however the
// configuration is now.
func (c Cache) Through() (int, error) {
	entries, err := c.entries()
	through := 0
	for _, e := range entries {
		if e.chained {
			through++
		}
	}
	return through, err
}

// place is an interface of a network namespace.
type place struct{ netns, ifName string }

// chained are the networks that the plugin is or was chained in: by the configurations, by what was attached through it, and by
// what the runtime had as configuration then.
func (c Cache) chained(records []*attachment.Record, entries []cached) (map[string]bool, error) {
	chained := make(map[string]bool)
	for _, r := range records {
		chained[r.Network] = true
	}
	for _, e := range entries {
		chained[e.Network] = chained[e.Network] || e.chained
	}
	networks, err := c.Chained()
	for _, network := range networks {
		chained[network] = true
	}
	return chained, err
}

// cached is an entry that could be a pod's, the interfaces on the host that its result names, and whether the plugin was in its
// chain.
type cached struct {
	Request
	hostLinks []string
	chained   bool
}

// checkHostLink returns an error if the result names host interfaces and hostLink is none of them. hostLink is the host side of the
// pod's interface, or empty if it has none: an interface that the runtime made as a veth is not adopted as another kind.
func (e *cached) checkHostLink(hostLink string) error {
	if len(e.hostLinks) == 0 || slices.Contains(e.hostLinks, hostLink) {
		return nil
	}
	return fmt.Errorf("its interface leads to %q on the host, and the runtime's cache names %q", hostLink, e.hostLinks)
}

func (c Cache) entries() ([]cached, error) {
	dir := filepath.Join(c.Dir, "results")
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var entries []cached
	var errs []error
	for _, f := range files {
		e, err := c.read(filepath.Join(dir, f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // its DEL came
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.Name(), err))
			continue
		}
		if e != nil {
			entries = append(entries, *e)
		}
	}
	return entries, errors.Join(errs...)
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
	one := &cached{chained: c.Is(e.Config), Request: Request{ContainerID: e.ContainerID, IfName: e.IfName, Netns: e.NetNS, Network: e.NetworkName, Pod: pod, IPs: ips}}
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

// located keeps those whose namespace is known, or the only one that fits, and whose interface holds one of the addresses.
func (c Cache) located(entries []cached) ([]cached, error) {
	v := &views{cache: c, seen: make(map[place][]netip.Addr)}
	var located []cached
	for _, e := range entries {
		if e.Netns == "" {
			fitting := slices.DeleteFunc(v.holders(e.Request), func(path string) bool {
				return len(e.hostLinks) == 0 || e.checkHostLink(c.HostLink(path, e.IfName)) != nil
			})
			if len(fitting) != 1 {
				continue
			}
			e.Netns = fitting[0]
		} else if !holdsOne(v.addresses(place{e.Netns, e.IfName}), e.IPs) {
			continue
		} else if err := e.checkHostLink(c.HostLink(e.Netns, e.IfName)); err != nil {
			v.errs = append(v.errs, fmt.Errorf("%s: %w", attachment.ID(e.ContainerID, e.IfName), err))
			continue
		}
		located = append(located, e)
	}
	return located, errors.Join(v.errs...)
}

func holdsOne(held, ips []netip.Addr) bool {
	return slices.ContainsFunc(ips, func(ip netip.Addr) bool { return slices.Contains(held, ip) })
}

// views is what was seen in network namespaces.
type views struct {
	cache   Cache
	seen    map[place][]netip.Addr
	holding map[string]map[netip.Addr][]string // the paths where an interface of a name holds an address
	errs    []error
}

func (v *views) addresses(at place) []netip.Addr {
	if ips, seen := v.seen[at]; seen {
		return ips
	}
	ips, err := v.cache.Addresses(at.netns, at.ifName)
	if err != nil {
		v.errs = append(v.errs, err)
	}
	v.seen[at] = ips
	return ips
}

// holders are the namespaces in which an interface of the request's name holds one of its addresses.
func (v *views) holders(r Request) []string {
	if v.holding[r.IfName] == nil {
		holding := make(map[netip.Addr][]string)
		for _, path := range v.cache.namespaces() {
			for _, ip := range v.addresses(place{path, r.IfName}) {
				holding[ip] = append(holding[ip], path)
			}
		}
		if v.holding == nil {
			v.holding = make(map[string]map[netip.Addr][]string)
		}
		v.holding[r.IfName] = holding
	}
	var paths []string
	for _, ip := range r.IPs {
		for _, path := range v.holding[r.IfName][ip] {
			if !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
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
