package imds

import (
	"net/url"
	"path"
	"strings"
)

const (
	// maxDecodings is how many times a path may be percent-encoded. A path that is encoded more
	// often still contains "%" after that and is refused.
	maxDecodings = 3
	maxPath      = 1024
	// nameChars are the characters of the metadata service's names, of the keys of instance tags
	// and of role names.
	nameChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+=,:@"
)

// canonical returns the only spelling of a request's path that is routed and forwarded, so that no
// two programs can interpret it differently. It is decoded completely, and has no parameters, empty
// segments or dot segments. It begins with a slash, and ends with one if the request's path did. ok
// is false for a path without such a spelling.
func canonical(p string) (clean string, ok bool) {
	if isCanonical(p) {
		return p, true
	}
	for range maxDecodings {
		if !strings.Contains(p, "%") {
			break
		}
		decoded, err := url.PathUnescape(p)
		if err != nil {
			return "", false
		}
		p = decoded
	}
	if !strings.HasPrefix(p, "/") || len(p) > maxPath {
		return "", false
	}
	segments := strings.Split(p, "/")
	for i, segment := range segments {
		segments[i], _, _ = strings.Cut(segment, ";")
	}
	clean = path.Clean("." + strings.Join(segments, "/"))
	switch {
	case clean == ".":
		return "/", true
	case clean == "..", strings.HasPrefix(clean, "../"), !consistsOf(clean, nameChars+"/"):
		return "", false
	}
	if last := segments[len(segments)-1]; last == "" || last == "." || last == ".." {
		clean += "/"
	}
	return "/" + clean, true
}

// isCanonical reports without an allocation whether a path is canonical, as nearly every real one
// is. It returns false for a few that are, such as one with a segment that begins with a dot.
func isCanonical(p string) bool {
	return strings.HasPrefix(p, "/") && len(p) <= maxPath && consistsOf(p, nameChars+"/") &&
		!strings.Contains(p, "//") && !strings.Contains(p, "/.")
}

func consistsOf(s, chars string) bool { return strings.TrimLeft(s, chars) == "" }
