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
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// host is a node's directories, and an installer for them.
type host struct {
	*Installer
	t *testing.T
}

const program = "#!/bin/true\nthe program\n"

func newHost(t *testing.T, files map[string]string) *host {
	t.Helper()
	root := t.TempDir()
	h := &host{t: t, Installer: &Installer{
		ConfDir: filepath.Join(root, "net.d"), BinDir: filepath.Join(root, "bin"), Interval: time.Hour, Log: slog.New(slog.DiscardHandler),
		Binary: Binary{Name: plugin, Source: strings.NewReader(program), Size: int64(len(program))}, Entry: []byte(own),
	}}
	for _, dir := range []string{h.ConfDir, h.BinDir} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range files {
		h.put(name, text)
	}
	return h
}

// put writes a configuration as one that has been there for long.
func (h *host) put(name, text string) {
	h.t.Helper()
	path := filepath.Join(h.ConfDir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
		h.t.Fatal(err)
	}
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, long, long); err != nil {
		h.t.Fatal(err)
	}
}

// files are the directory's, but for those in directories of it.
func (h *host) files() map[string]string {
	h.t.Helper()
	entries, err := os.ReadDir(h.ConfDir)
	if err != nil {
		h.t.Fatal(err)
	}
	files := make(map[string]string)
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		text, err := os.ReadFile(filepath.Join(h.ConfDir, e.Name()))
		if err != nil {
			h.t.Fatal(err)
		}
		files[e.Name()] = string(text)
	}
	return files
}

func (h *host) wantFiles(want map[string]string) {
	h.t.Helper()
	if diff := cmp.Diff(want, h.files()); diff != "" {
		h.t.Errorf("files (-want +got):\n%s", diff)
	}
}

const (
	made   = "10-a-conf-kube2iam-cni.conflist"
	ptp    = `{"cniVersion":"0.4.0","name":"a","type":"ptp"}`
	lone   = `{"cniVersion":"0.4.0","name":"a","type":"bridge"}`
	listed = "{\n  \"cniVersion\": \"0.4.0\",\n  \"name\": \"a\",\n  \"plugins\": [\n    " + lone + ",\n    " + own + "\n  ]\n}\n"
)

func TestInstallChainsTheEffectiveConfiguration(t *testing.T) {
	bridge, chained := chain("a", "bridge"), strings.Replace(chain("a", "bridge"), "]", ","+own+"]", 1)
	for name, c := range map[string]struct {
		before, after map[string]string
		did           int
		is            error  // of the error
		says          string // in the error
	}{
		"one":                         {before: map[string]string{"10-a.conflist": bridge}, after: map[string]string{"10-a.conflist": chained}, did: 2},
		"the first of two":            {before: map[string]string{"10-a.conflist": bridge, "05-b.conflist": chain("a", "bridge")}, after: map[string]string{"10-a.conflist": bridge, "05-b.conflist": chained}, did: 2},
		"the first that makes sense":  {before: map[string]string{"05-b.conflist": `{"name":"b","plugins":[`, "06-c.conflist": `{"plugins":[{"type":"x"}]}`, "07-d.conf": `{}`, "10-a.conflist": bridge}, after: map[string]string{"05-b.conflist": `{"name":"b","plugins":[`, "06-c.conflist": `{"plugins":[{"type":"x"}]}`, "07-d.conf": `{}`, "10-a.conflist": chained}, did: 2},
		"there":                       {before: map[string]string{"10-a.conflist": chained}, after: map[string]string{"10-a.conflist": chained}, did: 1},
		"none":                        {before: map[string]string{"10-a.conflist.bak": bridge, "README": ""}, after: map[string]string{"10-a.conflist.bak": bridge, "README": ""}, did: 1, is: ErrNoNetwork},
		"a lone plugin":               {before: map[string]string{"10-a.conf": lone}, after: map[string]string{made: listed, "10-a.conf": lone}, did: 2},
		"a lone plugin, there":        {before: map[string]string{"10-a.conf": lone, made: listed}, after: map[string]string{made: listed, "10-a.conf": lone}, did: 1},
		"a lone plugin, written anew": {before: map[string]string{"10-a.conf": ptp, made: listed}, after: map[string]string{made: strings.Replace(listed, "bridge", "ptp", 1), "10-a.conf": ptp}, did: 2},
		"a lone plugin, gone":         {before: map[string]string{"20-b.conflist": bridge, made: listed}, after: map[string]string{"20-b.conflist": chained}, did: 3},
		"a lone plugin, the last":     {before: map[string]string{made: listed}, after: map[string]string{}, did: 2, is: ErrNoNetwork},
		"a list before it":            {before: map[string]string{"05-b.conflist": bridge, "10-a.conf": lone, made: listed}, after: map[string]string{"05-b.conflist": chained, "10-a.conf": lone}, did: 3},
		"a lone plugin before it":     {before: map[string]string{"05-b.json": ptp, "10-a.conf": lone, made: listed}, after: map[string]string{"05-b-json-kube2iam-cni.conflist": strings.Replace(listed, "bridge", "ptp", 1), "05-b.json": ptp, "10-a.conf": lone}, did: 3},
		"a lone plugin and a list":    {before: map[string]string{"10-a.conf": lone, "10-a.conflist": bridge}, after: map[string]string{made: listed, "10-a.conf": lone, "10-a.conflist": bridge}, did: 2},
		"a list with no name":         {before: map[string]string{"10-a.conflist": `{"name":"","plugins":[{"type":"x"}]}`}, after: map[string]string{"10-a.conflist": `{"name":"","plugins":[{"type":"x"}]}`}, did: 1, says: "no name"},
		"a lone plugin with no name":  {before: map[string]string{"10-a.json": `{"type":"bridge"}`}, after: map[string]string{"10-a.json": `{"type":"bridge"}`}, did: 1, says: "no name"},
		"nothing but the plugin":      {before: map[string]string{"10-a.conflist": chain("a", plugin)}, after: map[string]string{"10-a.conflist": chain("a", plugin)}, did: 1, says: "makes an interface"},
		"in a file beside it":         {before: map[string]string{"10-a.conflist": chain("a", "bridge"), "a/50.conf": own}, after: map[string]string{"10-a.conflist": chain("a", "bridge")}, did: 1},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, c.before)
			did, err := h.Install()
			if c.is == nil && c.says == "" && err != nil || c.is != nil && !errors.Is(err, c.is) || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("error %v", err)
			}
			if len(did) != c.did {
				t.Errorf("did %q, want %d", did, c.did)
			}
			h.wantFiles(c.after)
			text, err := os.ReadFile(filepath.Join(h.BinDir, plugin))
			if err != nil || string(text) != program {
				t.Errorf("the program: %q, %v", text, err)
			}
			if did, _ := h.Install(); len(did) != 0 {
				t.Errorf("did again %q", did)
			}
		})
	}
}

func TestUnchainGivesBackWhatWasThere(t *testing.T) {
	for name, before := range map[string]map[string]string{
		"a list":        {"10-a.conflist": chain("a", "bridge", "portmap"), "20-b.conflist": chain("b", "macvlan")},
		"a lone plugin": {"10-a.conf": lone},
		"one in .json":  {"10-a.json": lone},
		"nothing":       {},
		"broken ones":   {"05-x.conflist": "{", "10-a.conflist": chain("a", "bridge")},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, before)
			if _, err := h.Install(); err != nil && !errors.Is(err, ErrNoNetwork) {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := Unchain(h.ConfDir, plugin); err != nil {
					t.Errorf("%v", err)
				}
				h.wantFiles(before)
			}
		})
	}
	// That is another runtime's directory.
	if did, err := Unchain(filepath.Join(t.TempDir(), "none"), plugin); did != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %q, %v", did, err)
	}
}

// TestUnchainKeepsWhatThePrimaryCNIWroteMeanwhile has a lone plugin's configuration be written anew after the agent ended.
func TestUnchainKeepsWhatThePrimaryCNIWroteMeanwhile(t *testing.T) {
	h := newHost(t, map[string]string{"10-a.conf": lone})
	if _, err := h.Install(); err != nil {
		t.Fatal(err)
	}
	h.put("10-a.conf", ptp)
	if _, err := Unchain(h.ConfDir, plugin); err != nil {
		t.Error(err)
	}
	h.wantFiles(map[string]string{"10-a.conf": ptp})
}

func TestUnchainSaysWhatIsStillChained(t *testing.T) {
	h := newHost(t, map[string]string{"10-a.conflist": chain("a", "bridge"), "a/50.conf": own})
	if _, err := Unchain(h.ConfDir, plugin); err == nil || !strings.Contains(err.Error(), `["a"]`) {
		t.Errorf("chained by hand, in a file of its own: %v", err)
	}
}

func TestEntriesAreFoundAsTheyStand(t *testing.T) {
	entry := `{ "type": "kube2iam-cni", "stateDir": "/x" }`
	h := newHost(t, map[string]string{"10-a.conflist": chain("a", "bridge"), "20-b.conflist": strings.Replace(chain("b", "x"), "]", ","+entry+"]", 1), "30-c.conflist": "{", "40-d.conf": own})
	entries, err := Entries(h.ConfDir, plugin)
	if err != nil || len(entries) != 1 || string(entries[0]) != entry {
		t.Errorf("%q, %v", entries, err)
	}
}

// TestWhatIsWrittenMeanwhileStays has a primary CNI write in the moment in which the entry is put in, again and again.
func TestWhatIsWrittenMeanwhileStays(t *testing.T) {
	for name, write := range map[string]func(path, text string) error{
		"renamed into place": func(path, text string) error {
			return errors.Join(os.WriteFile(path+".tmp", []byte(text), 0o600), os.Rename(path+".tmp", path))
		},
		"another": func(path, text string) error {
			return errors.Join(os.Remove(path), os.WriteFile(path, []byte(text), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, nil)
			path := filepath.Join(h.ConfDir, "10-a.conflist")
			changed := 0
			for i := range 300 {
				h.put("10-a.conflist", chain("a", "bridge"))
				newer := chain("a", "bridge", fmt.Sprint("newer-", i))
				f, err := readConfig(path)
				if err != nil {
					t.Fatal(err)
				}
				var both sync.WaitGroup
				both.Go(func() {
					if err := write(path, newer); err != nil {
						t.Error(err)
					}
				})
				err = replace(f, []byte(chain("a", "bridge", plugin)))
				both.Wait()
				if errors.Is(err, errChanged) || errors.Is(err, fs.ErrNotExist) {
					changed++
				} else if err != nil {
					t.Fatal(err)
				}
				if text, err := os.ReadFile(path); err != nil || string(text) != newer {
					t.Fatalf("%d: the file has %q, %v", i, text, err)
				}
				if entries, _ := os.ReadDir(h.ConfDir); len(entries) != 1 {
					t.Fatalf("left: %v", entries)
				}
			}
			if changed == 0 {
				t.Error("it was never written meanwhile")
			}
		})
	}
}

func TestOwnerStays(t *testing.T) {
	h := newHost(t, map[string]string{"10-a.conflist": chain("a", "bridge")})
	path := filepath.Join(h.ConfDir, "10-a.conflist")
	if err := os.Chown(path, 12, 34); err != nil {
		t.Skip("it takes root to give a file away")
	}
	if _, err := h.Install(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 12 || owner.Gid != 34 || info.Mode() != 0o640 {
		t.Errorf("%d:%d %v", owner.Uid, owner.Gid, info.Mode())
	}
}

// TestBrokenFileIsWaitedForBriefly has it be written just now, by its own word, which is worth little: clocks are set.
func TestBrokenFileIsWaitedForBriefly(t *testing.T) {
	for name, written := range map[string]time.Duration{"now": 0, "tomorrow": 24 * time.Hour, "long ago": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, map[string]string{"05-x.conflist": "{broken", "10-a.conflist": chain("a", "bridge")})
			now := time.Now()
			broken := filepath.Join(h.ConfDir, "05-x.conflist")
			if at := now.Add(written); os.Chtimes(broken, at, at) != nil {
				t.Fatal("times")
			}
			h.invalid = nil
			_, err := h.chain(now)
			if waits := errors.Is(err, ErrUnsettled); waits != (written >= 0) || !waits && err != nil {
				t.Errorf("at first %v", err)
			}
			if _, err := h.chain(now.Add(settleTime - time.Millisecond)); errors.Is(err, ErrUnsettled) != (written >= 0) {
				t.Errorf("a moment before it has settled: %v", err)
			}
			if _, err := h.chain(now.Add(settleTime)); err != nil {
				t.Errorf("after it has settled: %v", err)
			}
			if text := h.files()["10-a.conflist"]; !Has([]byte(text), plugin) {
				t.Error("the next one is not chained")
			}
			// Written again, it is waited for again.
			if at := now.Add(written + time.Second); os.Chtimes(broken, at, at) != nil {
				t.Fatal("times")
			}
			if _, err := h.chain(now.Add(time.Second)); errors.Is(err, ErrUnsettled) != (written >= 0) {
				t.Errorf("written again: %v", err)
			}
		})
	}
}

func TestModeAndOwnerStayAndASymbolicLinkIsFollowed(t *testing.T) {
	h := newHost(t, nil)
	real := filepath.Join(t.TempDir(), "real.conflist")
	if err := os.WriteFile(real, []byte(chain("a", "bridge")), 0o604); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, filepath.Join(h.ConfDir, "10-a.conflist")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Install(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(real)
	if err != nil || info.Mode() != 0o604 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if link, err := os.Lstat(filepath.Join(h.ConfDir, "10-a.conflist")); err != nil || link.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link: %v, %v", link, err)
	}
	if text, _ := os.ReadFile(real); !Has(text, plugin) {
		t.Errorf("%s", text)
	}
}

func TestProgramIsReplacedByAnotherAndSweptWhereOneDied(t *testing.T) {
	h := newHost(t, map[string]string{"10-a.conflist": chain("a", "bridge")})
	path := filepath.Join(h.BinDir, plugin)
	old := filepath.Join(h.BinDir, "."+plugin+"123")
	for _, file := range []string{path, old} {
		if err := os.WriteFile(file, []byte("older"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(old, long, long); err != nil {
		t.Fatal(err)
	}
	running, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer running.Close()
	for _, c := range []struct {
		what   string
		damage func() error
	}{
		{"an older one", func() error { return nil }},
		{"the same size", func() error { return os.WriteFile(path, bytes.Repeat([]byte("x"), len(program)), 0o755) }},
		{"not executable", func() error { return os.Chmod(path, 0o644) }},
		{"gone", func() error { return os.Remove(path) }},
	} {
		if err := c.damage(); err != nil {
			t.Fatal(err)
		}
		if did, err := h.Install(); err != nil || len(did) == 0 {
			t.Fatalf("%s: %q, %v", c.what, did, err)
		}
		if text, err := os.ReadFile(path); err != nil || string(text) != program {
			t.Errorf("%s: %q, %v", c.what, text, err)
		}
	}
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what a process left that died: %v", err)
	}
	var text bytes.Buffer
	if text.ReadFrom(running); text.String() != "older" {
		t.Errorf("a plugin that runs was changed: %q", text.String())
	}
}

// TestNothingIsChainedWithoutItsProgram has a directory that is a file: a runtime would fail each pod.
func TestNothingIsChainedWithoutItsProgram(t *testing.T) {
	before := map[string]string{"10-a.conflist": chain("a", "bridge")}
	h := newHost(t, before)
	h.BinDir = filepath.Join(h.ConfDir, "10-a.conflist")
	if _, err := h.Install(); err == nil {
		t.Error("no error")
	}
	h.wantFiles(before)
}

// running is an installer that runs until the test ends, and what it told last.
type running struct {
	*host
	looked chan error
}

func (h *host) run() *running {
	r := &running{h, make(chan error, 1000)}
	h.Installed = func(err error) { r.looked <- err }
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		if err := h.Installer.Run(ctx); err != nil {
			h.t.Error(err)
		}
	})
	h.t.Cleanup(func() { cancel(); done.Wait() })
	return r
}

// eventually looks again each time that the installer did.
func (r *running) eventually(what string, holds func(error) bool) {
	r.t.Helper()
	for deadline := time.After(20 * time.Second); ; {
		select {
		case err := <-r.looked:
			if holds(err) {
				return
			}
		case <-deadline:
			r.t.Fatalf("%s: never; the directory has %q", what, r.files())
		}
	}
}

// chained tells whether a file is a whole list that the plugin is chained in.
func (r *running) chained(name string) func(error) bool {
	return func(error) bool {
		text, err := os.ReadFile(filepath.Join(r.ConfDir, name))
		return err == nil && json.Valid(text) && Has(text, plugin)
	}
}

// rename writes a configuration as an installer of a CNI does.
func (r *running) rename(name, text string) {
	r.t.Helper()
	tmp := filepath.Join(r.ConfDir, name+".tmp")
	if err := errors.Join(os.WriteFile(tmp, []byte(text), 0o600), os.Rename(tmp, filepath.Join(r.ConfDir, name))); err != nil {
		r.t.Fatal(err)
	}
}

func TestChainedAgainWhateverThePrimaryCNIDoes(t *testing.T) {
	h := newHost(t, nil)
	if err := os.Remove(h.ConfDir); err != nil { // it starts later than we do
		t.Fatal(err)
	}
	r := h.run()
	r.eventually("waiting", func(err error) bool { return errors.Is(err, ErrNoNetwork) })
	if err := os.Mkdir(h.ConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	r.rename("10-a.conflist", chain("a", "bridge"))
	r.eventually("chained once it is there", r.chained("10-a.conflist"))

	r.rename("10-a.conflist", chain("a", "bridge", "portmap"))
	r.eventually("chained after it was written anew", func(err error) bool {
		text, _ := os.ReadFile(filepath.Join(r.ConfDir, "10-a.conflist"))
		return Has(text, plugin) && Has(text, "portmap")
	})

	// Written in place, and in parts.
	f, err := os.OpenFile(filepath.Join(r.ConfDir, "10-a.conflist"), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	whole := chain("a", "ptp")
	f.WriteString(whole[:20])
	f.WriteString(whole[20:])
	f.Close()
	r.eventually("chained after it was written in parts", func(err error) bool {
		text, _ := os.ReadFile(filepath.Join(r.ConfDir, "10-a.conflist"))
		return Has(text, plugin) && Has(text, "ptp")
	})

	r.rename("05-b.conflist", chain("b", "cilium"))
	r.eventually("chained in one that comes first", r.chained("05-b.conflist"))
	if err := os.Remove(filepath.Join(r.ConfDir, "05-b.conflist")); err != nil {
		t.Fatal(err)
	}
	r.eventually("chained in the one that is left", r.chained("10-a.conflist"))

	if err := os.Remove(filepath.Join(r.ConfDir, "10-a.conflist")); err != nil {
		t.Fatal(err)
	}
	r.eventually("waiting again", func(err error) bool { return errors.Is(err, ErrNoNetwork) })
	r.rename("10-a.conf", lone)
	r.eventually("chained to a lone plugin", r.chained(made))
	r.rename("10-a.conflist", chain("a", "bridge", "tuning")) // in its place, as an upgrade does
	if err := os.Remove(filepath.Join(r.ConfDir, "10-a.conf")); err != nil {
		t.Fatal(err)
	}
	r.eventually("chained after a list took its place", func(err error) bool {
		text, _ := os.ReadFile(filepath.Join(r.ConfDir, "10-a.conflist"))
		_, gone := os.Stat(filepath.Join(r.ConfDir, made))
		return Has(text, plugin) && Has(text, "tuning") && errors.Is(gone, fs.ErrNotExist)
	})

	if err := os.Remove(filepath.Join(r.BinDir, plugin)); err != nil {
		t.Fatal(err)
	}
	r.eventually("its program is back", func(error) bool {
		_, err := os.Stat(filepath.Join(r.BinDir, plugin))
		return err == nil
	})
}

// TestThereIsAWholeConfigurationAtAnyMoment reads it as a runtime does while a primary CNI writes it again and again.
func TestThereIsAWholeConfigurationAtAnyMoment(t *testing.T) {
	h := newHost(t, map[string]string{"10-a.conflist": chain("a", "bridge")})
	r := h.run()
	stop := make(chan struct{})
	var readers sync.WaitGroup
	readers.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			text, err := os.ReadFile(filepath.Join(h.ConfDir, "10-a.conflist"))
			if err != nil || !json.Valid(text) || !Has(text, "bridge") {
				t.Errorf("a runtime read %q, %v", text, err)
				return
			}
		}
	})
	for i := range 50 {
		types := []string{"bridge"}
		if i%2 == 0 {
			types = append(types, "portmap")
		}
		r.rename("10-a.conflist", chain("a", types...))
		r.eventually("chained", r.chained("10-a.conflist"))
	}
	close(stop)
	readers.Wait()
}
