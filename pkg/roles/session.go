package roles

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// maxSessionName is the longest role session name that AssumeRole takes.
const maxSessionName = 64

// SessionName is the session name of a pod, "<namespace>.<pod>". A namespace holds no dot, so the names of two pods never
// meet; one that is too long, or outside the alphabet that AssumeRole takes, is cut and cleaned and ends in a hash of
// the whole.
func SessionName(namespace, pod string) string {
	whole := namespace + "." + pod
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune("_+=,.@-", r):
			return r
		}
		return '-'
	}, whole)
	if clean == whole && len(clean) <= maxSessionName {
		return clean
	}
	sum := sha256.Sum256([]byte(whole))
	suffix := "=" + hex.EncodeToString(sum[:8]) // "=" stands in no Kubernetes name, so no whole name ends like this
	return clean[:min(len(clean), maxSessionName-len(suffix))] + suffix
}
