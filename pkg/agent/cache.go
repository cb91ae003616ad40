package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Cache is what container runtimes store of each live attachment through libcni (cachedInfo in
// libcni/api.go), in a directory that only root can write.
type Cache struct {
	// Dir is libcni's cache. Its entries are in results/.
	Dir string
	// NetnsDirs are where the runtimes keep network namespaces. They are searched for pods whose
	// entry does not name the namespace, as with libcni before 1.3.
	NetnsDirs []string
	// ParsePod reads the pod from an entry's CNI_ARGS.
	ParsePod func(args string) (attachment.Pod, error)
	// Chained returns the networks that the plugin is chained in, by the node's configurations.
	Chained func() ([]string, error)
	// HasPlugin reports whether a network configuration has the plugin in its chain.
	HasPlugin func(config []byte) bool
}

// cacheEntry is the part of an entry that is read.
type cacheEntry struct {
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
	cacheKind     = "cniCacheV1"
	maxCacheEntry = 1 << 20
)

// cachedAttachment is an entry that can be a pod's.
type cachedAttachment struct {
	attach.Request
	hostLinks []string // the host interfaces that the result names
	isChained bool     // the plugin was in the entry's configuration
}

// CountChained returns how many cached attachments have the plugin in their chain. Some runtimes
// send DEL from their cached configuration, so the binary is needed for those.
func (c Cache) CountChained() (int, error) {
	entries, err := c.entries()
	n := 0
	for _, e := range entries {
		if e.isChained {
			n++
		}
	}
	return n, err
}

// checkHostSide returns an error if the result names host interfaces and hostSide is none of them.
// hostSide is the host side of the pod's interface, or "" if it has none: an interface that the
// runtime created as a veth is not adopted as another kind.
func (c *cachedAttachment) checkHostSide(hostSide string) error {
	if len(c.hostLinks) == 0 || slices.Contains(c.hostLinks, hostSide) {
		return nil
	}
	return fmt.Errorf("its interface leads to %q on the host, and the runtime's cache names %q", hostSide, c.hostLinks)
}

// entries returns the entries that can be pods'. The error joins those of entries that cannot be
// read.
func (c Cache) entries() ([]cachedAttachment, error) {
	dir := filepath.Join(c.Dir, "results")
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var entries []cachedAttachment
	var errs []error
	for _, f := range files {
		e, err := c.read(filepath.Join(dir, f.Name()))
		switch {
		case errors.Is(err, fs.ErrNotExist): // its DEL came
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", f.Name(), err))
		case e != nil:
			entries = append(entries, *e)
		}
	}
	return entries, errors.Join(errs...)
}

// read returns an entry, or nil if it is not a pod's.
func (c Cache) read(path string) (*cachedAttachment, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxCacheEntry))
	if err != nil {
		return nil, err
	}
	var e cacheEntry
	if json.Unmarshal(data, &e) != nil || e.Kind != cacheKind {
		return nil, nil // of an older libcni, which does not store the pod, or half-written
	}
	var args []string
	for _, pair := range e.CniArgs {
		args = append(args, pair[0]+"="+pair[1])
	}
	pod, err := c.ParsePod(strings.Join(args, ";"))
	if err != nil || pod == (attachment.Pod{}) {
		return nil, err
	}
	if err := attachment.ValidateID(e.ContainerID, e.IfName); err != nil {
		return nil, err
	}
	result, err := parseResult(e.Result)
	if err != nil {
		return nil, err
	}
	ips, err := attach.ResultIPs(result)
	if err != nil || len(ips) == 0 {
		return nil, err
	}
	cached := &cachedAttachment{
		Request:   attach.Request{ContainerID: e.ContainerID, IfName: e.IfName, Netns: e.NetNS, Network: e.NetworkName, Pod: pod, IPs: ips},
		isChained: c.HasPlugin(e.Config),
	}
	for _, i := range result.Interfaces {
		if i.Sandbox == "" {
			cached.hostLinks = append(cached.hostLinks, i.Name)
		}
	}
	return cached, nil
}

func parseResult(data []byte) (*types100.Result, error) {
	version, err := create.DecodeVersion(data)
	if err != nil {
		return nil, err
	}
	result, err := create.Create(version, data)
	if err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(result)
}
