package imds

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// forwardListing answers with the service's listing of a path, without the names that the caller would not be answered: the clients that crawl
// all that is listed, as cloud-init does, take one refusal for a failure of everything.
func (h *Handler) forwardListing(w http.ResponseWriter, r *http.Request, caller Caller) error {
	get := r.Clone(r.Context())
	get.Method = http.MethodGet // the length of the answer to a HEAD depends on the names, too
	all := &listingWriter{ResponseWriter: w}
	if err := h.upstream.Forward(all, get); err != nil {
		return err
	}
	body := h.answered(r.Context(), caller, r.URL.Path, all.body.String())
	header := w.Header()
	delete(header, "Etag") // it is of all names
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	io.WriteString(w, body)
	return nil
}

// answered returns the listing of a path without the names that the caller would not be answered. It returns body where that is a value, for it
// has a line that no name can have.
func (h *Handler) answered(ctx context.Context, caller Caller, path, body string) string {
	lines := strings.Split(body, "\n")
	answered := lines[:0]
	for _, name := range lines {
		child, ok := canonical(childOf(path, name))
		if !ok {
			return body
		}
		if name == "" || h.answers(ctx, caller, child) {
			answered = append(answered, name)
		}
	}
	return strings.Join(answered, "\n")
}

// answers reports whether a GET of a canonical path that the service lists is answered to the caller.
func (h *Handler) answers(ctx context.Context, caller Caller, path string) bool {
	switch to, _ := routeOf(path); to {
	case forward:
		return !h.denied(path)
	case iamListing, iamInfo, roleList:
		_, _, err := caller.Role(ctx)
		return err == nil
	}
	return false
}

// childOf returns the path of a name in the listing of a path. The name of a public key is listed as "0=name", and its path is "0/".
func childOf(listing, name string) string {
	listing = strings.TrimSuffix(listing, "/")
	if strings.HasSuffix(listing, "/meta-data/public-keys") {
		if index, _, ok := strings.Cut(name, "="); ok {
			name = index + "/"
		}
	}
	return listing + "/" + name
}

// isListing reports whether the service answers a canonical path with names. With a slash at its end that is so of every path but those
// below which users write what they like. Without, a path may as well be a value, so that the known ones count.
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

// What the service lists, below /{version}/dynamic and /{version}/meta-data.
var (
	dynamicListings  = map[string]bool{"": true, "fws": true, "instance-identity": true}
	metaDataListings = map[string]bool{
		"": true, "autoscaling": true, "block-device-mapping": true, "elastic-gpus": true, "elastic-gpus/associations": true,
		"elastic-inference": true, "elastic-inference/associations": true, "events": true, "events/maintenance": true,
		"events/recommendations": true, "metrics": true, "network": true, "network/interfaces": true, "network/interfaces/macs": true,
		"placement": true, "public-keys": true, "services": true, "spot": true, "system": true, "tags": true, "tags/instance": true,
	}
)

// isIndexed reports whether the path, below meta-data, is that of one of the instance's interfaces or public keys.
func isIndexed(path string) bool {
	if mac, ok := strings.CutPrefix(path, "network/interfaces/macs/"); ok {
		_, below, _ := strings.Cut(mac, "/")
		return below == "" || below == "ipv4-associations"
	}
	index, ok := strings.CutPrefix(path, "public-keys/")
	return ok && !strings.Contains(index, "/")
}

// listingWriter keeps the body of an answer, which Forward wrote, for later.
type listingWriter struct {
	http.ResponseWriter
	body bytes.Buffer
}

// Write implements http.ResponseWriter. It fails for a listing that is too long.
func (w *listingWriter) Write(b []byte) (int, error) {
	if w.body.Len()+len(b) > maxSmallBody {
		return 0, fmt.Errorf("a listing of more than %d bytes", maxSmallBody)
	}
	return w.body.Write(b)
}

// FlushError is for http.ResponseController.
func (w *listingWriter) FlushError() error { return nil }

// Unwrap is for http.ResponseController.
func (w *listingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
