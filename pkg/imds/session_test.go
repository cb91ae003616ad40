package imds

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestTokenIsThePodsOwnUntilItEnds(t *testing.T) {
	now := time.Now()
	s := NewSessions(bytes.Repeat([]byte{1}, KeySize))
	token := s.Token("uid-a", now.Add(time.Minute))
	if strings.ContainsAny(token, "\n =") {
		t.Errorf("%q", token)
	}
	same, other := NewSessions(bytes.Repeat([]byte{1}, KeySize)), NewSessions(bytes.Repeat([]byte{2}, KeySize))
	for name, tt := range map[string]struct {
		sessions *Sessions
		token    string
		pod      string
		at       time.Time
		want     bool
	}{
		"now":               {s, token, "uid-a", now, true},
		"after a restart":   {same, token, "uid-a", now, true},
		"at its last":       {s, token, "uid-a", now.Add(time.Minute - time.Millisecond), true},
		"ended":             {s, token, "uid-a", now.Add(time.Minute), false},
		"another pod's":     {s, token, "uid-b", now, false},
		"another key's":     {other, token, "uid-a", now, false},
		"empty":             {s, "", "uid-a", now, false},
		"cut":               {s, token[:len(token)-1], "uid-a", now, false},
		"longer":            {s, token + "A", "uid-a", now, false},
		"not base64":        {s, strings.Repeat("!", len(token)), "uid-a", now, false},
		"with a line break": {s, token[:len(token)-2] + "\r\n", "uid-a", now, false},
	} {
		t.Run(name, func(t *testing.T) {
			before := new(verifiedToken)
			if s.valid(before, token, "uid-a", now); before.token != token {
				t.Fatal("a valid token is not remembered")
			}
			if tt.sessions != s {
				before = new(verifiedToken) // another process has other connections
			}
			for memory, p := range map[string]*verifiedToken{"first": new(verifiedToken), "after a valid one": before} {
				if got := tt.sessions.valid(p, tt.token, tt.pod, tt.at); got != tt.want {
					t.Errorf("%s: %v, want %v", memory, got, tt.want)
				}
			}
		})
	}
	p := new(verifiedToken)
	for i := range token {
		forged := []byte(token)
		forged[i] ^= 1
		if s.valid(p, string(forged), "uid-a", now) || s.valid(new(verifiedToken), string(forged), "uid-a", now) {
			t.Errorf("valid with another character at %d", i)
		}
	}
}

func FuzzForgedTokensAreInvalid(f *testing.F) {
	s := NewSessions(NewKey())
	token := s.Token("uid-a", time.Now().Add(time.Hour))
	f.Add(token[:20] + strings.Repeat("A", len(token)-20))
	f.Add("")
	f.Add(strings.Repeat("A", len(token)))
	f.Fuzz(func(t *testing.T, forged string) {
		if forged != token && s.valid(new(verifiedToken), forged, "uid-a", time.Now()) {
			t.Fatalf("%q is valid", forged)
		}
	})
}

func TestKeyIsMadeOnceAndKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "session.key")
	var wg sync.WaitGroup
	keys := make([][]byte, 16)
	for i := range keys {
		wg.Go(func() {
			key, err := LoadKey(file)
			if err != nil {
				t.Error(err)
			}
			keys[i] = key
		})
	}
	wg.Wait()
	for _, key := range keys {
		if !bytes.Equal(key, keys[0]) || len(key) != KeySize {
			t.Fatalf("%d bytes, or not the same", len(key))
		}
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	left, err := os.ReadDir(filepath.Dir(file))
	if err != nil || len(left) != 1 {
		t.Errorf("%v, %v: want the key alone", left, err)
	}
}

func TestKeyThatOthersCouldReadIsRefused(t *testing.T) {
	for name, make := range map[string]func(file string) error{
		"readable":  func(f string) error { return os.WriteFile(f, NewKey(), 0o644) },
		"short":     func(f string) error { return os.WriteFile(f, NewKey()[:5], 0o600) },
		"link":      func(f string) error { return os.Symlink("/dev/zero", f) },
		"directory": func(f string) error { return os.Mkdir(f, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "session.key")
			if err := make(file); err != nil {
				t.Fatal(err)
			}
			if _, err := LoadKey(file); err == nil {
				t.Error("no error")
			}
		})
	}
}
