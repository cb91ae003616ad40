package imds

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Sessions creates and verifies session tokens. A token consists of a version, its expiry, and a MAC of
// both and of the pod. So the proxy stores no tokens, a token outlives a restart of the proxy, and no
// other pod can use it.
type Sessions struct {
	macs sync.Pool // of hash.Hash
}

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
func NewSessions(key []byte) *Sessions {
	return &Sessions{macs: sync.Pool{New: func() any { return hmac.New(sha256.New, key) }}}
}

// Token returns a token for the pod that is valid until end.
func (s *Sessions) Token(pod string, end time.Time) string {
	var raw [tokenSize]byte
	raw[0] = tokenVersion
	binary.BigEndian.PutUint64(raw[1:], uint64(end.UnixMilli()))
	var sum [sha256.Size]byte
	copy(raw[9:], s.sum(sum[:0], raw[:9], pod))
	return base64.URLEncoding.EncodeToString(raw[:])
}

// verify returns the expiry of the pod's token in milliseconds since 1970. ok is false if the token was
// not made for the pod.
func (s *Sessions) verify(token, pod string) (end int64, ok bool) {
	if len(token) != tokenChars {
		return 0, false
	}
	var raw [tokenSize]byte
	if n, err := base64.URLEncoding.Decode(raw[:], []byte(token)); err != nil || n != tokenSize || raw[0] != tokenVersion {
		return 0, false
	}
	var sum [sha256.Size]byte
	if !hmac.Equal(raw[9:], s.sum(sum[:0], raw[:9], pod)) {
		return 0, false
	}
	return int64(binary.BigEndian.Uint64(raw[1:9])), true
}

// verifiedToken is the last token that was verified on a connection, whose requests usually repeat it.
// It saves their MAC, which is most of the cost of a cached answer.
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

func (s *Sessions) sum(buf, head []byte, pod string) []byte {
	mac := s.macs.Get().(hash.Hash)
	defer s.macs.Put(mac)
	mac.Reset()
	mac.Write(head)
	mac.Write([]byte(pod))
	return mac.Sum(buf)[:macSize]
}

// LoadKey reads the MAC key from the file. It creates the file with a random key if it does not exist.
// If several processes create the file concurrently, all return the same key, because link(2) fails if
// the file exists.
func LoadKey(file string) ([]byte, error) {
	key, err := readKey(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, err
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".session-key-*")
	if err != nil {
		return nil, err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if _, err := tmp.Write(NewKey()); err != nil {
		return nil, err
	}
	if err := os.Link(tmp.Name(), file); err != nil && !errors.Is(err, fs.ErrExist) {
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
