package imds

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strconv"
	"time"
)

// Sessions creates and verifies session tokens. A token consists of a version, its expiry, and a
// MAC of both and of the pod. So the proxy stores no tokens, a token outlives a restart of the
// proxy, and no other pod can use it.
type Sessions struct{ key []byte }

const (
	// KeySize is the length of the MAC key in bytes.
	KeySize = 32

	tokenVersion = 1
	macSize      = 24
	tokenSize    = 1 + 8 + macSize
	// tokenChars is tokenSize in base64.
	tokenChars = tokenSize / 3 * 4
)

// NewSessions returns Sessions with a MAC key of KeySize bytes.
func NewSessions(key []byte) *Sessions { return &Sessions{key} }

// Token returns a token for the pod that is valid until end.
func (s *Sessions) Token(pod string, end time.Time) string {
	head := binary.BigEndian.AppendUint64([]byte{tokenVersion}, uint64(end.UnixMilli()))
	return base64.URLEncoding.EncodeToString(append(head, s.mac(head, pod)...))
}

// verify returns the expiry of the pod's token in milliseconds since 1970. ok is false if the token
// was not made for the pod.
func (s *Sessions) verify(token, pod string) (end int64, ok bool) {
	raw, err := base64.URLEncoding.Strict().DecodeString(token)
	if err != nil || len(token) != tokenChars || len(raw) != tokenSize || raw[0] != tokenVersion {
		return 0, false
	}
	head, mac := raw[:tokenSize-macSize], raw[tokenSize-macSize:]
	return int64(binary.BigEndian.Uint64(head[1:])), hmac.Equal(mac, s.mac(head, pod))
}

func (s *Sessions) mac(head []byte, pod string) []byte {
	mac := hmac.New(sha256.New, s.key)
	mac.Write(head)
	mac.Write([]byte(pod))
	return mac.Sum(nil)[:macSize]
}

// verifiedToken is the last token that was verified on a connection, whose requests usually repeat
// it. It saves their MAC, which is most of the cost of a cached answer.
type verifiedToken struct {
	token, pod string
	end        int64
}

// valid reports whether the token was made for the pod and has not expired. It updates last.
func (s *Sessions) valid(last *verifiedToken, token, pod string, now time.Time) bool {
	if token == "" || token != last.token || pod != last.pod {
		end, ok := s.verify(token, pod)
		if !ok {
			return false
		}
		*last = verifiedToken{token: token, pod: pod, end: end}
	}
	return now.UnixMilli() < last.end
}

const (
	minTTL = 1
	maxTTL = 21600
)

// serveToken answers a request for a session token.
func (h *Handler) serveToken(w http.ResponseWriter, r *http.Request, caller Caller, now time.Time) error {
	if r.Method != http.MethodPut {
		return methodNotAllowed(w, http.MethodPut)
	}
	if _, ok := r.Header["X-Forwarded-For"]; ok {
		return errForbidden
	}
	// ParseUint accepts digits only, so neither "+60" nor "0x3c" is a TTL.
	ttl, err := strconv.ParseUint(r.Header.Get(tokenTTLHeader), 10, 16)
	if err != nil || ttl < minTTL || ttl > maxTTL {
		return errTTL
	}
	token := h.Sessions.Token(caller.Session(), now.Add(time.Duration(ttl)*time.Second))
	w.Header()[tokenTTLHeader] = []string{strconv.FormatUint(ttl, 10)}
	writeText(w, token)
	return nil
}

// LoadKey reads the MAC key from the file. It creates the file with a random key if it does not
// exist. If several processes create the file concurrently, all return the same key, because
// link(2) fails if the file exists.
func LoadKey(file string) ([]byte, error) {
	key, err := readKey(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	tmp := file + "." + rand.Text()
	defer os.Remove(tmp)
	if err := os.WriteFile(tmp, NewKey(), 0o600); err != nil {
		return nil, err
	}
	if err := os.Link(tmp, file); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return readKey(file)
}

// NewKey returns a random key.
func NewKey() []byte {
	key := make([]byte, KeySize)
	rand.Read(key) // never fails
	return key
}

func readKey(file string) ([]byte, error) {
	info, err := os.Lstat(file)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 || info.Size() != KeySize {
		return nil, fmt.Errorf("%s: not a file of %d bytes that only its owner may read", file, KeySize)
	}
	return os.ReadFile(file)
}
