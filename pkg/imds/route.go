package imds

import (
	"regexp"
	"strings"
)

// route is the resource that a canonical path names.
type route int

const (
	notFoundRoute       route = iota
	forwardRoute              // the node's metadata service answers
	tokenRoute                // /latest/api/token
	versionedTokenRoute       // the token path under a dated version, which the service forbids
	iamRoute                  // …/meta-data/iam
	infoRoute                 // …/meta-data/iam/info
	roleRoute                 // …/meta-data/iam/security-credentials
	credentialsRoute          // …/meta-data/iam/security-credentials/{role}
)

// routeOf returns the route of a canonical path, and the role's name for credentialsRoute. A path
// that could yield the credentials or the identity of the node is never forwarded, in any letter
// case.
func routeOf(path string) (r route, role string) {
	if path == "/" {
		return forwardRoute, ""
	}
	version, rest, _ := strings.Cut(strings.TrimSuffix(path[1:], "/"), "/")
	switch rest {
	case "meta-data/iam/security-credentials":
		return roleRoute, ""
	case "meta-data/iam/info":
		return infoRoute, ""
	case "meta-data/iam":
		return iamRoute, ""
	case "api/token":
		if version == "latest" {
			return tokenRoute, ""
		}
		return versionedTokenRoute, ""
	}
	if role, ok := strings.CutPrefix(rest, "meta-data/iam/security-credentials/"); ok {
		if strings.Contains(role, "/") {
			return notFoundRoute, ""
		}
		return credentialsRoute, role
	}
	if !versions.MatchString(version) || namesCredentials(rest) {
		return notFoundRoute, ""
	}
	return forwardRoute, ""
}

var versions = regexp.MustCompile(`^(latest|1\.0|[0-9]{4}-[0-9]{2}-[0-9]{2})$`)

// namesCredentials reports whether a segment names credentials: iam, security-credentials and names
// that begin with it, and identity-credentials, which are the instance's own.
func namesCredentials(rest string) bool {
	for segment := range strings.SplitSeq(rest, "/") {
		s := strings.ToLower(segment)
		if s == "iam" || strings.HasPrefix(s, "security-credentials") || strings.HasPrefix(s, "identity-credentials") {
			return true
		}
	}
	return false
}
