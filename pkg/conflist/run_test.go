package conflist

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// start runs the installer until the test ends, and returns its results.
func (n *testNode) start() <-chan error {
	results := make(chan error, 1000)
	n.Installed = func(err error) { results <- err }
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		if err := n.Run(ctx); err != nil {
			n.t.Error(err)
		}
	})
	n.t.Cleanup(func() { cancel(); done.Wait() })
	return results
}

// await checks a condition after each result of the installer until it is true.
func (n *testNode) await(results <-chan error, what string, condition func(error) bool) {
	n.t.Helper()
	for deadline := time.After(20 * time.Second); ; {
		select {
		case err := <-results:
			if condition(err) {
				return
			}
		case <-deadline:
			n.t.Fatalf("not within 20s: %s; the directory has %q", what, n.files())
		}
	}
}

// isChained returns whether a file is a valid list with these plugins and the entry.
func (n *testNode) isChained(name string, plugins ...string) func(error) bool {
	return func(error) bool {
		text, err := os.ReadFile(n.path(name))
		for _, p := range append(plugins, plugin) {
			if err != nil || !json.Valid(text) || !Has(text, p) {
				return false
			}
		}
		return true
	}
}

func isNoNetwork(err error) bool { return errors.Is(err, ErrNoNetwork) }

func TestRunChainsAgainAfterChanges(t *testing.T) {
	n := newNode(t, nil)
	n.must(os.Remove(n.ConfDir)) // the primary CNI starts later
	results := n.start()
	n.await(results, "no network", isNoNetwork)
	n.must(os.Mkdir(n.ConfDir, 0o755))
	n.rename("10-a.conflist", chain("a", "bridge"))
	n.await(results, "chained in a new file", n.isChained("10-a.conflist"))

	n.rename("10-a.conflist", chain("a", "bridge", "portmap"))
	n.await(results, "chained after a rename", n.isChained("10-a.conflist", "portmap"))

	f, err := os.OpenFile(n.path("10-a.conflist"), os.O_WRONLY|os.O_TRUNC, 0)
	n.must(err)
	text := chain("a", "ptp")
	_, first := f.WriteString(text[:20])
	_, second := f.WriteString(text[20:])
	n.must(errors.Join(first, second, f.Close()))
	n.await(results, "chained after two writes in place", n.isChained("10-a.conflist", "ptp"))

	n.rename("05-b.conflist", chain("b", "cilium"))
	n.await(results, "chained in a file that sorts first", n.isChained("05-b.conflist"))
	n.must(os.Remove(n.path("05-b.conflist")))
	n.await(results, "chained in the remaining file", n.isChained("10-a.conflist"))

	n.must(os.Remove(n.path("10-a.conflist")))
	n.await(results, "no network after a removal", isNoNetwork)
	n.rename("10-a.conf", single)
	n.await(results, "a generated list", n.isChained(generated))
	n.rename("10-a.conflist", chain("a", "bridge", "tuning")) // as an upgrade does
	n.must(os.Remove(n.path("10-a.conf")))
	n.await(results, "chained in the list that replaces the single plugin", func(err error) bool {
		_, statErr := os.Stat(n.path(generated))
		return n.isChained("10-a.conflist", "tuning")(err) && errors.Is(statErr, fs.ErrNotExist)
	})

	n.must(os.Remove(filepath.Join(n.BinDir, plugin)))
	n.await(results, "the binary again", func(error) bool {
		_, err := os.Stat(filepath.Join(n.BinDir, plugin))
		return err == nil
	})
}

// TestConfigurationIsValidAtAnyTime reads the configuration as a runtime does while a primary CNI
// writes it repeatedly.
func TestConfigurationIsValidAtAnyTime(t *testing.T) {
	n := newNode(t, map[string]string{"10-a.conflist": chain("a", "bridge")})
	results := n.start()
	stop := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			text, err := os.ReadFile(n.path("10-a.conflist"))
			if err != nil || !json.Valid(text) || !Has(text, "bridge") {
				t.Errorf("a runtime reads %q, %v", text, err)
				return
			}
		}
	})
	for i := range 40 { // each text is another: the same one would be a conflict
		n.rename("10-a.conflist", chain("a", "bridge", fmt.Sprint("plugin", i)))
		n.await(results, "chained", n.isChained("10-a.conflist"))
	}
	close(stop)
	reader.Wait()
}

func TestStateIsLoggedOncePerChange(t *testing.T) {
	n := newNode(t, nil)
	var log bytes.Buffer
	var last error
	n.WatchOnly, n.Log = true, slog.New(slog.NewTextHandler(&log, nil))
	n.Installed = func(err error) { last = err }
	for times := 1; times <= 3; times++ {
		n.write("10-a.conflist", chain("a", "bridge"))
		for range 5 {
			n.installAndLog()
		}
		if count := strings.Count(log.String(), "the entry is missing"); count != times || !errors.Is(last, ErrNotChained) {
			t.Errorf("%d. time without the entry: %v and %d warnings:\n%s", times, last, count, &log)
		}
		n.write("10-a.conflist", chain("a", "bridge", plugin))
		for range 5 {
			n.installAndLog()
		}
		if count := strings.Count(log.String(), `"the plugin is chained"`); count != times || last != nil {
			t.Errorf("%d. time with the entry: %v and %d lines:\n%s", times, last, count, &log)
		}
	}
}

// TestLastingWriteIsReported has a program write an invalid configuration again and again.
func TestLastingWriteIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, nil)
		var log bytes.Buffer
		var reported error
		n.Log = slog.New(slog.NewTextHandler(&log, nil))
		n.Installed = func(err error) { reported = err }
		start := time.Now()
		for time.Since(start) < 2*unsettledWarning {
			n.write("10-a.conflist", fmt.Sprintf("{invalid %d", time.Since(start)))
			n.must(os.Chtimes(n.path("10-a.conflist"), time.Now(), time.Now()))
			if next := n.installAndLog(); next != unsettledInterval {
				t.Fatalf("reads it again in %v", next)
			}
			if lasts := time.Since(start) >= unsettledWarning; errors.Is(reported, ErrUnsettled) != lasts {
				t.Fatalf("reported after %v: %v", time.Since(start), reported)
			}
			time.Sleep(unsettledInterval)
		}
		if count := strings.Count(log.String(), "level=WARN"); count != 1 {
			t.Errorf("%d warnings, want 1:\n%s", count, &log)
		}
	})
}
