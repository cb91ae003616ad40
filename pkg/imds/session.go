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

// Sessions makes and checks session tokens. A token is its own proof: a version, when it ends, and a MAC of both and of the
// pod it was made for. So nothing is kept for it, it survives a restart of the proxy with the key, and it is worth nothing
// to another pod.
type Sessions struct {
	macs sync.Pool // of hash.Hash
}

const (
	// KeySize is the length of the key that tokens are made with, in bytes.
	KeySize = 32

	tokenVersion = 1
	macSize      = 24
	tokenSize    = 1 + 8 + macSize
	// tokenChars is tokenSize in base64.
	tokenChars = tokenSize / 3 * 4
)

// NewSessions makes tokens with a key of KeySize bytes.
func NewSessions(key []byte) *Sessions {
	return &Sessions{macs: sync.Pool{New: func() any { return hmac.New(sha256.New, key) }}}
}

// Token is a token for the pod that lasts until end.
func (s *Sessions) Token(pod string, end time.Time) string {
	var raw [tokenSize]byte
	raw[0] = tokenVersion
	binary.BigEndian.PutUint64(raw[1:], uint64(end.UnixMilli()))
	var sum [sha256.Size]byte
	copy(raw[9:], s.sum(sum[:0], raw[:9], pod))
	return base64.URLEncoding.EncodeToString(raw[:])
}

// end is when a token ends that was made for the pod, in milliseconds since 1970.
func (s *Sessions) end(token, pod string) (int64, bool) {
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

// proof is a token that was found to be made for a pod, and when it ends: what comes over one connection has the same one again and
// again.
type proof struct {
	token, pod string
	end        int64
}

// valid tells whether the token was made for the pod and has not ended. It remembers by p.
func (s *Sessions) valid(p *proof, token, pod string, now time.Time) bool {
	if token == "" || token != p.token || pod != p.pod {
		end, ok := s.end(token, pod)
		if !ok {
			return false
		}
		*p = proof{token: token, pod: pod, end: end}
	}
	return now.UnixMilli() < p.end
}

func (s *Sessions) sum(buf, head []byte, pod string) []byte {
	mac := s.macs.Get().(hash.Hash)
	defer s.macs.Put(mac)
	mac.Reset()
	mac.Write(head)
	mac.Write([]byte(pod))
	return mac.Sum(buf)[:macSize]
}

// LoadKey reads the key from the file, which is made with a random one where it does not exist yet. Of several processes that
// make it at once, one wins and all read its key.
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

// NewKey is a random key.
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
