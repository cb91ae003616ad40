package imds

import (
	"net/url"
	"strings"
)

const (
	// maxDecodings is how many times a path may be percent-encoded. A path that is encoded more often
	// still contains "%" after that and is refused.
	maxDecodings = 3
	maxPath      = 1024
	// nameChars are the characters of the metadata service's names, of the keys of instance tags and of
	// role names.
	nameChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+=,:@"
)

// canonical returns the only spelling of a request's path that is routed and forwarded, so that no two
// programs can interpret it differently. It is decoded completely, and has no parameters, empty
// segments or dot segments. It begins with a slash, and ends with one if the request's path did. ok is
// false for a path without such a spelling.
func canonical(path string) (clean string, ok bool) {
	if isCanonical(path) {
		return path, true
	}
	for range maxDecodings {
		if !strings.Contains(path, "%") {
			break
		}
		decoded, err := url.PathUnescape(path)
		if err != nil {
			return "", false
		}
		path = decoded
	}
	if !strings.HasPrefix(path, "/") || len(path) > maxPath {
		return "", false
	}
	var segments []string
	last := ""
	for segment := range strings.SplitSeq(path[1:], "/") {
		segment, _, _ = strings.Cut(segment, ";")
		last = segment
		switch segment {
		case "", ".":
		case "..":
			if len(segments) == 0 {
				return "", false
			}
			segments = segments[:len(segments)-1]
		default:
			if !consistsOf(segment, nameChars) {
				return "", false
			}
			segments = append(segments, segment)
		}
	}
	if len(segments) == 0 {
		return "/", true
	}
	clean = "/" + strings.Join(segments, "/")
	if last == "" || last == "." || last == ".." {
		clean += "/"
	}
	return clean, true
}

// isCanonical reports without an allocation whether a path is canonical, as nearly every real one is.
// It returns false for a few that are, such as one with a segment that begins with a dot.
func isCanonical(path string) bool {
	return strings.HasPrefix(path, "/") && len(path) <= maxPath && consistsOf(path, nameChars+"/") &&
		!strings.Contains(path, "//") && !strings.Contains(path, "/.")
}

func consistsOf(s, chars string) bool { return strings.TrimLeft(s, chars) == "" }
