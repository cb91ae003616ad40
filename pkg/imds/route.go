package imds

import "strings"

// route is what a canonical path asks for.
type route int

const (
	notFound       route = iota
	forward              // the node's metadata service answers
	token                // PUT /latest/api/token
	tokenOfVersion       // the token path under a dated version, which the service forbids
	iamListing           // …/meta-data/iam
	iamInfo              // …/meta-data/iam/info
	roleList             // …/meta-data/iam/security-credentials
	roleDocument         // …/meta-data/iam/security-credentials/{role}
)

// routeOf is the route of a canonical path, with the role's name for roleDocument. Everything that could yield the node's
// own credentials or its identity's is answered here or not found, never forwarded, in any mix of letter cases.
func routeOf(path string) (r route, role string) {
	if path == "/" {
		return forward, ""
	}
	version, rest, _ := strings.Cut(strings.TrimSuffix(path[1:], "/"), "/")
	switch rest {
	case "meta-data/iam/security-credentials":
		return roleList, ""
	case "meta-data/iam/info":
		return iamInfo, ""
	case "meta-data/iam":
		return iamListing, ""
	case "api/token":
		if version == "latest" {
			return token, ""
		}
		return tokenOfVersion, ""
	}
	if role, ok := strings.CutPrefix(rest, "meta-data/iam/security-credentials/"); ok {
		if strings.Contains(role, "/") {
			return notFound, ""
		}
		return roleDocument, role
	}
	if !versioned(version) || yieldsCredentials(rest) {
		return notFound, ""
	}
	return forward, ""
}

// versioned tells whether a path's first segment is a version of the metadata service: "latest", a date, or "1.0".
func versioned(s string) bool {
	if s == "latest" || s == "1.0" {
		return true
	}
	if len(s) != len("2006-01-02") || s[4] != '-' || s[7] != '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; i != 4 && i != 7 && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// yieldsCredentials tells whether any segment names credentials: iam, security-credentials and what its name begins, and
// identity-credentials, which are the instance's own.
func yieldsCredentials(rest string) bool {
	for segment := range strings.SplitSeq(rest, "/") {
		s := strings.ToLower(segment)
		if s == "iam" || strings.HasPrefix(s, "security-credentials") || strings.HasPrefix(s, "identity-credentials") {
			return true
		}
	}
	return false
}
