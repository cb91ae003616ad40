package imds

import (
	"net/url"
	"strings"
)

// canonical is the one spelling of a request's path: decoded until nothing is left to decode, without parameters, empty and
// dot segments, beginning with a slash and ending in one only if the request's did. It is what is routed and what is
// forwarded, so no two readers of a path can disagree about it. ok is false for a path that has no such spelling.
func canonical(path string) (clean string, ok bool) {
	if plain(path) {
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
			if !spelled(segment) {
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

const (
	// maxDecodings is how often a path may have been encoded; one that was encoded more often still holds a "%" and is refused.
	maxDecodings = 3
	maxPath      = 1024
)

// plain tells whether a path is canonical as it stands, as nearly every real one is.
func plain(path string) bool {
	if path == "" || path[0] != '/' || len(path) > maxPath {
		return false
	}
	for i := 1; i < len(path); i++ {
		switch c := path[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		case c == '.':
			if path[i-1] == '/' {
				return false
			}
		case c == '/':
			if path[i-1] == '/' {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// spelled tells whether a segment holds only what the metadata service's own names hold: letters, digits, and the marks that
// keys of instance tags and names of roles may have.
func spelled(segment string) bool {
	for i := range len(segment) {
		switch c := segment[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("-_.+=,:@", c) >= 0:
		default:
			return false
		}
	}
	return true
}
