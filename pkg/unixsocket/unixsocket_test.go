package unixsocket

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve listens at path until the test ends, and answers each connection with name.
func serve(t *testing.T, path, name string) *Listener {
	t.Helper()
	l, err := Listen(t.Context(), path, 10*time.Millisecond, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				done <- err
				return
			}
			io.WriteString(c, name)
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	return l
}

// answer returns what the process at path answers, or an empty string if there is none.
func answer(t *testing.T, path string) string {
	t.Helper()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if c == nil {
		return ""
	}
	defer c.Close()
	text, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// eventually dials path until the process there answers with want.
func eventually(t *testing.T, path, want string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); answer(t, path) != want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%q never answers", want)
		}
	}
}

func TestDialReturnsNilIfNoProcessListens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	check := func(state string, isAbandoned bool) {
		t.Helper()
		c, err := Dial(t.Context(), path)
		if err != nil || (c == nil) != isAbandoned || IsAbandoned(path) != isAbandoned {
			t.Errorf("%s: %v, %v, abandoned %t", state, c, err, IsAbandoned(path))
		}
		if c != nil {
			c.Close()
		}
	}
	check("no file", true)
	l := serve(t, path, "a")
	check("a process listens", false)
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
	check("its process has closed the socket", true)
}

func TestDialFailsIfThePathIsNotUsable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(path, "s")
	if c, err := Dial(t.Context(), path); c != nil || !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("%v, %v", c, err)
	}
	if IsAbandoned(path) {
		t.Error("an error that says nothing about the listener counts as its absence")
	}
}

func TestOnlyTheOwnUserCanConnect(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	serve(t, path, "a")
	if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestLastListenerHasThePath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	serve(t, path, "a")
	serve(t, path, "b")
	if got := answer(t, path); got != "b" {
		t.Errorf("%q answers", got)
	}
}

func TestListenerReturnsToAnAbandonedPath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	serve(t, path, "a")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	eventually(t, path, "a")

	other := serve(t, path, "b")
	eventually(t, path, "b")
	other.Close()
	eventually(t, path, "a")
}

func TestListenerReturnsWhenTheDirectoryIsBack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	path := filepath.Join(dir, "s")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	serve(t, path, "a")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if got := answer(t, path); got != "" {
		t.Errorf("%q answers without a file", got)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	eventually(t, path, "a")
}

// TestListenTriesAgain has a directory that appears later.
func TestListenTriesAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	path := filepath.Join(dir, "socket")
	warned := make(chan struct{}, 1)
	log := slog.New(slog.NewTextHandler(writerFunc(func(b []byte) (int, error) {
		select {
		case warned <- struct{}{}:
		default:
		}
		return len(b), nil
	}), nil))
	listeners := make(chan *Listener)
	go func() {
		l, err := Listen(t.Context(), path, time.Millisecond, log)
		if err != nil {
			t.Error(err)
		}
		listeners <- l
	}()
	<-warned
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l := <-listeners
	defer l.Close()
	if IsAbandoned(path) {
		t.Error("no process listens")
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
