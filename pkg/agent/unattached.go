package agent

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// podInterface is an interface of a network namespace.
type podInterface struct{ netns, ifName string }

// findUnattached returns the cached attachments of pods that have no record, whose network the
// plugin is chained in, whose namespace exists, and whose interface holds one of the addresses. The
// error joins those of entries that cannot be read and of networks that the plugin is not chained
// in.
//
// A pod with NET_ADMIN chooses its addresses and can replace its interface, and /proc/PID/ns/net
// leads to another pod when the PID is reused. No pod chooses its host interface. So an entry whose
// result names host interfaces is returned only if the pod's interface leads to one of them. An
// entry that names neither host interfaces nor the namespace is left out, and so are two that claim
// one interface: at most one of them still exists, and nothing says which.
func (a *Agent) findUnattached(records []*attachment.Record) ([]cachedAttachment, error) {
	entries, err := a.Cache.entries()
	errs := []error{err}
	isChained, err := a.chainedNetworks(records, entries)
	errs = append(errs, err)

	attached := make(map[string]*attachment.Record, len(records))
	for _, r := range records {
		attached[r.ID()] = r
	}
	claims := make(map[podInterface]int)
	var unknown []cachedAttachment
	for _, e := range entries {
		if r := attached[attachment.ID(e.ContainerID, e.IfName)]; r != nil {
			claims[podInterface{r.Netns, r.IfName}]++
		} else {
			unknown = append(unknown, e)
		}
	}
	located, err := a.locate(unknown)
	errs = append(errs, err)
	for _, e := range located {
		claims[podInterface{e.Netns, e.IfName}]++
	}
	var unattached []cachedAttachment
	notChained := make(map[string]bool)
	for _, e := range located {
		switch {
		case !isChained[e.Network]:
			notChained[e.Network] = true
		case claims[podInterface{e.Netns, e.IfName}] == 1:
			unattached = append(unattached, e)
		}
	}
	for _, network := range slices.Sorted(maps.Keys(notChained)) {
		errs = append(errs, fmt.Errorf("network %q: the plugin is not chained in it, and its pods stay refused", network))
	}
	return unattached, errors.Join(errs...)
}

// chainedNetworks returns the networks that the plugin is or was chained in: by the configurations,
// by the records, and by the runtime's cached configurations.
func (a *Agent) chainedNetworks(records []*attachment.Record, entries []cachedAttachment) (map[string]bool, error) {
	isChained := make(map[string]bool)
	for _, r := range records {
		isChained[r.Network] = true
	}
	for _, e := range entries {
		isChained[e.Network] = isChained[e.Network] || e.isChained
	}
	networks, err := a.Cache.Chained()
	for _, network := range networks {
		isChained[network] = true
	}
	return isChained, err
}

// locate returns the entries whose interface exists and holds one of the addresses, with their
// namespace. It enters each namespace at most once for each name of an interface.
func (a *Agent) locate(entries []cachedAttachment) ([]cachedAttachment, error) {
	s := &netnsSearch{agent: a, addresses: make(map[podInterface][]netip.Addr), holders: make(map[string]map[netip.Addr][]string)}
	var located []cachedAttachment
	for _, e := range entries {
		if e.Netns == "" {
			paths := slices.DeleteFunc(s.search(e.Request), func(path string) bool {
				return len(e.hostLinks) == 0 || e.checkHostSide(a.HostSide(path, e.IfName)) != nil
			})
			if len(paths) != 1 {
				continue
			}
			e.Netns = paths[0]
		} else if !containsAny(s.addressesOf(podInterface{e.Netns, e.IfName}), e.IPs) {
			continue
		} else if err := e.checkHostSide(a.HostSide(e.Netns, e.IfName)); err != nil {
			s.errs = append(s.errs, fmt.Errorf("%s: %w", attachment.ID(e.ContainerID, e.IfName), err))
			continue
		}
		located = append(located, e)
	}
	return located, errors.Join(s.errs...)
}

// netnsSearch caches the addresses of interfaces in network namespaces.
type netnsSearch struct {
	agent     *Agent
	addresses map[podInterface][]netip.Addr
	holders   map[string]map[netip.Addr][]string // paths of namespaces, by interface name and address
	errs      []error
}

func (s *netnsSearch) addressesOf(i podInterface) []netip.Addr {
	if ips, ok := s.addresses[i]; ok {
		return ips
	}
	ips, err := s.agent.Addresses(i.netns, i.ifName)
	if err != nil {
		s.errs = append(s.errs, err)
	}
	s.addresses[i] = ips
	return ips
}

// search returns the paths of the namespaces in which an interface of the request's name holds one
// of its addresses.
func (s *netnsSearch) search(req attach.Request) []string {
	if s.holders[req.IfName] == nil {
		holders := make(map[netip.Addr][]string)
		for _, dir := range s.agent.Cache.NetnsDirs {
			files, _ := os.ReadDir(dir)
			for _, f := range files {
				path := filepath.Join(dir, f.Name())
				for _, ip := range s.addressesOf(podInterface{path, req.IfName}) {
					holders[ip] = append(holders[ip], path)
				}
			}
		}
		s.holders[req.IfName] = holders
	}
	var paths []string
	for _, ip := range req.IPs {
		for _, path := range s.holders[req.IfName][ip] {
			if !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}
