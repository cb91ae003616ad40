package imds

import (
	"context"
	"strings"
)

// filterListing returns the service's listing of a path without the names that the caller is
// refused. Clients that crawl listings, such as cloud-init, fail completely after one refusal. If
// body has a line that cannot be a name, it is a value and is returned unchanged.
func (h *Handler) filterListing(ctx context.Context, caller Caller, path, body string) string {
	lines := strings.Split(body, "\n")
	allowed := lines[:0]
	for _, name := range lines {
		child, ok := canonical(childOf(path, name))
		if !ok {
			return body
		}
		if name == "" || h.isAllowed(ctx, caller, child) {
			allowed = append(allowed, name)
		}
	}
	return strings.Join(allowed, "\n")
}

// isAllowed reports whether the caller may get a canonical path that the service lists.
func (h *Handler) isAllowed(ctx context.Context, caller Caller, path string) bool {
	switch route, _ := routeOf(path); route {
	case forwardRoute:
		return !h.isDenied(path)
	case iamRoute, infoRoute, roleRoute:
		_, _, err := caller.Role(ctx)
		return err == nil
	}
	return false
}

// childOf returns the path of a name in a listing. A public key is listed as "0=name" and has the
// path "0/".
func childOf(listing, name string) string {
	listing = strings.TrimSuffix(listing, "/")
	if strings.HasSuffix(listing, "/meta-data/public-keys") {
		if index, _, ok := strings.Cut(name, "="); ok {
			name = index + "/"
		}
	}
	return listing + "/" + name
}

// isListing reports whether the service answers a canonical path with a list of names. A path with
// a slash at its end is a listing, unless users choose the content below it. Without the slash, only
// the known listings count, because other paths may be values.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-metadata.html
func isListing(path string) bool {
	version, rest, _ := strings.Cut(strings.Trim(path, "/"), "/")
	kind, below, _ := strings.Cut(rest, "/")
	switch {
	case version == "", rest == "":
		return true
	case kind == "user-data", kind == "meta-data" && strings.HasPrefix(below, "tags/instance/"):
		return false
	case strings.HasSuffix(path, "/"):
		return true
	}
	return kind == "dynamic" && dynamicListings[below] || kind == "meta-data" && (metaDataListings[below] || isIndexed(below))
}

// The listings of the service, below /{version}/dynamic and /{version}/meta-data.
var (
	dynamicListings  = map[string]bool{"": true, "fws": true, "instance-identity": true}
	metaDataListings = map[string]bool{
		"": true, "autoscaling": true, "block-device-mapping": true, "elastic-gpus": true, "elastic-gpus/associations": true,
		"elastic-inference": true, "elastic-inference/associations": true, "events": true, "events/maintenance": true,
		"events/recommendations": true, "metrics": true, "network": true, "network/interfaces": true, "network/interfaces/macs": true,
		"placement": true, "public-keys": true, "services": true, "spot": true, "system": true, "tags": true, "tags/instance": true,
	}
)

// isIndexed reports whether a path below meta-data lists a network interface or a public key.
func isIndexed(path string) bool {
	if mac, ok := strings.CutPrefix(path, "network/interfaces/macs/"); ok {
		_, below, _ := strings.Cut(mac, "/")
		return below == "" || below == "ipv4-associations"
	}
	index, ok := strings.CutPrefix(path, "public-keys/")
	return ok && !strings.Contains(index, "/")
}
