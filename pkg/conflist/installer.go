package conflist

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Installer keeps a plugin chained on a node. It is not for concurrent use.
type Installer struct {
	// ConfDir is where the runtime reads its network configurations, and BinDir where it finds the plugins' programs.
	ConfDir, BinDir string
	// Binary is the plugin's program; its name is the plugin's type.
	Binary Binary
	// Entry is what is chained: a JSON object with the plugin's "type".
	Entry []byte
	// WatchOnly has Install change nothing: its error wraps ErrNotChained where the entry is missing.
	WatchOnly bool
	// Interval is how often everything is looked at without a change that is told of.
	Interval time.Duration
	// Installed is called after each look, with the error of it. It may be nil.
	Installed func(error)
	Log       *slog.Logger

	broken, waiting string // what was said last
	settling        settling
	unsettled       time.Time // since when a file is waited for; zero while none is
}

// Install puts the program in place, and only then the entry into the effective network configuration, and tells what it did, a line each. Where
// nothing is missing it changes nothing. The error wraps ErrNoNetwork, ErrUnsettled, or what the file system says.
func (i *Installer) Install() (did []string, err error) {
	now := time.Now()
	if i.WatchOnly {
		return nil, i.watch(now)
	}
	sweep(i.BinDir, now, func(base string) bool { return base == i.Binary.Name })
	sweep(i.ConfDir, now, isConfig)
	put, err := i.Binary.install(i.BinDir)
	if err != nil {
		return nil, fmt.Errorf("the plugin's program: %w", err)
	}
	if put {
		did = append(did, "program "+filepath.Join(i.BinDir, i.Binary.Name))
	}
	// Whoever wrote a file since it was read wrote something else: it is read again.
	for range 5 {
		var more []string
		if more, err = i.chain(now); !errors.Is(err, errChanged) {
			return append(did, more...), err
		}
	}
	return did, err
}

// ErrNotChained is the error of a network configuration without the plugin's entry.
var ErrNotChained = errors.New("the plugin is not in the chain of")

// delegating are the plugins that make a pod's network by another configuration of the directory.
var delegating = []string{"multus", "multus-shim"}

// watch looks for the plugin in the configuration that runtimes take.
func (i *Installer) watch(now time.Time) error {
	if i.settling == nil {
		i.settling = make(settling)
	}
	f, broken, err := effective(i.ConfDir, func(string) bool { return false }, i.settling, now)
	i.sayBroken(broken)
	if err != nil {
		return err
	}
	more, err := f.folder()
	if err != nil {
		return fmt.Errorf("network configuration %s: %w", f.path, err)
	}
	plugins := append(slices.Clone(f.Plugins), more...)
	if slices.Contains(plugins, entry{i.Binary.Name}) {
		return nil
	}
	if first := append([]entry{{f.Type}}, plugins...); slices.ContainsFunc(first, func(e entry) bool { return slices.Contains(delegating, e.Type) }) {
		if networks, err := Chained(i.ConfDir, i.Binary.Name); len(networks) > 0 {
			return nil
		} else if err != nil {
			return err
		}
	}
	return fmt.Errorf("%w %s", ErrNotChained, f.path)
}

func (i *Installer) chain(now time.Time) ([]string, error) {
	if i.settling == nil {
		i.settling = make(settling)
	}
	f, broken, err := effective(i.ConfDir, func(name string) bool { return isMade(name, i.Binary.Name) }, i.settling, now)
	i.sayBroken(broken)
	switch {
	case errors.Is(err, ErrNoNetwork):
		// What a list was made of is gone, and the network with it.
		did, failed := removeMade(i.ConfDir, i.Binary.Name, "")
		return did, errors.Join(err, failed)
	case err != nil:
		return nil, err
	case f.Name == "":
		return nil, fmt.Errorf("network configuration %s: the network has no name", f.path)
	}
	var did []string
	kept := ""
	if f.lone {
		kept = madeName(f.path, i.Binary.Name)
		did, err = i.listOf(f, kept)
	} else {
		did, err = i.into(f)
	}
	if err != nil {
		return did, err
	}
	more, err := removeMade(i.ConfDir, i.Binary.Name, kept)
	return append(did, more...), err
}

// into puts the entry into a list.
func (i *Installer) into(f *file) ([]string, error) {
	if beside, err := f.folder(); err != nil || slices.Contains(beside, entry{i.Binary.Name}) {
		return nil, err // by hand, in a file of its own
	}
	list, err := parseList(f.text)
	if err != nil {
		return nil, fmt.Errorf("network configuration %s: %w", f.path, err)
	}
	text, err := list.with(i.Binary.Name, i.Entry)
	if err != nil {
		return nil, fmt.Errorf("network configuration %s: %w", f.path, err)
	}
	if bytes.Equal(text, f.text) {
		return nil, nil
	}
	if err := replace(f, text); err != nil {
		return nil, fmt.Errorf("chain the plugin: %w", err)
	}
	return []string{"entry in " + f.path}, nil
}

// listOf has a list stand before one plugin's configuration: of this and the entry. The other stays where it is, as its CNI wrote it: with it
// the list goes.
func (i *Installer) listOf(f *file, path string) ([]string, error) {
	text, err := listOf(f.text, i.Entry)
	if err != nil {
		return nil, fmt.Errorf("network configuration %s: %w", f.path, err)
	}
	switch there, err := read(path); {
	case errors.Is(err, fs.ErrNotExist):
		err = create(path, f.info, text)
		if err != nil {
			return nil, fmt.Errorf("chain the plugin: %w", err)
		}
	case there == nil:
		return nil, fmt.Errorf("chain the plugin: %w", err)
	case bytes.Equal(there.text, text):
		return nil, nil
	default:
		if err := replace(there, text); err != nil {
			return nil, fmt.Errorf("chain the plugin: %w", err)
		}
	}
	return []string{"entry in " + path + ", which stands before " + f.path}, nil
}

// madeName is the file of the list that stands for one plugin's configuration, "10-a.conf": "10-a-conf-kube2iam-cni.conflist", which
// runtimes read before it, for "-" sorts before ".".
func madeName(conf, plugin string) string {
	ext := filepath.Ext(conf)
	return strings.TrimSuffix(conf, ext) + "-" + ext[1:] + "-" + plugin + ".conflist"
}

// isMade tells whether a file's name is one of madeName's.
func isMade(name, plugin string) bool {
	base, ok := strings.CutSuffix(name, "-"+plugin+".conflist")
	return ok && (strings.HasSuffix(base, "-conf") || strings.HasSuffix(base, "-json"))
}

// removeMade removes the lists that were made, but the one that is kept.
func removeMade(dir, plugin, kept string) (did []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !isMade(e.Name(), plugin) || path == kept {
			continue
		}
		if failed := os.Remove(path); failed != nil && !errors.Is(failed, fs.ErrNotExist) {
			err = errors.Join(err, failed)
			continue
		}
		did = append(did, path+" removed")
	}
	if len(did) > 0 {
		err = errors.Join(err, syncDir(dir))
	}
	return did, err
}

// Run installs, and again whenever something changed: a primary CNI writes its configuration anew when it is upgraded and at each boot.
// It says what it does and what keeps it from it, and ends with ctx, leaving everything as it is. With WatchOnly it only says what is missing.
func (i *Installer) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		i.Log.Warn("changes of network configurations are found by looking only", "interval", i.Interval, "error", err)
		watcher = &fsnotify.Watcher{}
	} else {
		defer watcher.Close()
	}
	for {
		unwatched := false
		if err == nil {
			// Again each time: a directory that was not there, or is another one by now, is not watched yet.
			dirs := []string{i.ConfDir, i.BinDir}
			if i.WatchOnly {
				dirs = dirs[:1]
			}
			for _, dir := range dirs {
				unwatched = watcher.Add(dir) != nil || unwatched
			}
		}
		next := i.look()
		if unwatched { // it may be there by now, and looked at, and nobody would tell of the next change
			next = min(next, time.Second)
		}
		timer := time.NewTimer(next)
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-timer.C:
				waiting = false
			case event := <-watcher.Events:
				waiting = !i.concerns(event)
			case err := <-watcher.Errors:
				i.Log.Warn("watching network configurations", "error", err)
				waiting = false
			}
		}
		timer.Stop()
	}
}

// concerns tells whether an event may be of what is kept in place.
func (i *Installer) concerns(event fsnotify.Event) bool {
	if filepath.Dir(event.Name) == filepath.Clean(i.BinDir) {
		return filepath.Base(event.Name) == i.Binary.Name
	}
	return isConfig(event.Name) || event.Name == filepath.Clean(i.ConfDir)
}

// unsettled is how soon a file is read again that is being written.
const unsettled = 100 * time.Millisecond

// unsettledFor is how long that is nothing to speak of.
const unsettledFor = 10 * time.Second

// look installs, says what came of it, and tells when to look again.
func (i *Installer) look() time.Duration {
	did, err := i.Install()
	if len(did) > 0 {
		i.Log.Info("installed", "did", did)
	}
	next, said := i.Interval, ""
	switch {
	case errors.Is(err, ErrUnsettled):
		if now := time.Now(); i.unsettled.IsZero() {
			i.unsettled = now
		} else if now.Sub(i.unsettled) > unsettledFor {
			i.Log.Warn("a network configuration has been changing for a while; nothing is chained until it stays as it is", "error", err)
			i.unsettled = now
		}
		return unsettled // and what holds is as it was
	case errors.Is(err, ErrNoNetwork):
		next, said = min(i.Interval, time.Second), err.Error()
		if said != i.waiting {
			i.Log.Info("waiting for the primary CNI to write its network configuration", "directory", i.ConfDir)
		}
	case errors.Is(err, ErrNotChained):
		said = err.Error()
		if said != i.waiting {
			i.Log.Warn("the entry is missing: new pods get no credentials; chain it, or run the agent with --install", "error", err)
		}
	case err != nil:
		said = err.Error()
		if said != i.waiting {
			i.Log.Error("the plugin is not chained: new pods get no credentials, and are not kept from the node's; trying again", "error", err)
		}
	case i.waiting != "":
		i.Log.Info("the plugin is chained")
	}
	i.waiting, i.unsettled = said, time.Time{}
	if i.Installed != nil {
		i.Installed(err)
	}
	return next
}

func (i *Installer) sayBroken(err error) {
	said := ""
	if err != nil {
		said = err.Error()
	}
	if said != "" && said != i.broken {
		i.Log.Warn("network configurations that runtimes pass over", "error", err)
	}
	i.broken = said
}
