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
	// Interval is how often everything is looked at without a change that is told of.
	Interval time.Duration
	// Installed is called after each look, with the error of it. It may be nil.
	Installed func(error)
	Log       *slog.Logger

	broken, waiting string // what was said last
}

// Install puts the program in place, and only then the entry into the effective network configuration, and tells what it did, a line each. Where
// nothing is missing it changes nothing. The error wraps ErrNoNetwork, ErrUnsettled, or what the file system says.
func (i *Installer) Install() (did []string, err error) {
	now := time.Now()
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

func (i *Installer) chain(now time.Time) ([]string, error) {
	f, broken, err := effective(i.ConfDir, now)
	i.sayBroken(broken)
	if err != nil {
		return nil, err
	}
	if f.lone {
		return i.convert(f)
	}
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

// aside is what is appended to the name of a lone plugin's configuration that a list stands for; runtimes read no such file.
const aside = ".kube2iam-cni"

// convert makes a list of a lone plugin's configuration, beside it, and puts the other aside: its name sorts before the list's, so that a
// runtime that looks in between takes it, or the list.
func (i *Installer) convert(f *file) ([]string, error) {
	if f.text == nil {
		return nil, fmt.Errorf("network configuration %s is empty", f.path)
	}
	text, err := listOf(f.text, i.Entry)
	if err != nil {
		return nil, fmt.Errorf("network configuration %s: %w", f.path, err)
	}
	list := listName(f.path)
	switch there, err := read(list); {
	case errors.Is(err, fs.ErrNotExist):
		err = write(list, f.info, text, func() error {
			if _, err := os.Lstat(list); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s: %w", list, errChanged)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("chain the plugin: %w", err)
		}
	case err != nil && there == nil:
		return nil, fmt.Errorf("chain the plugin: %w", err)
	case err == nil && (standsFor(there.text, f.path, i.Binary.Name) || standsFor(there.text, f.path+aside, i.Binary.Name)):
		if err := replace(there, text); err != nil {
			return nil, fmt.Errorf("chain the plugin: %w", err)
		}
	default:
		return nil, fmt.Errorf("chain the plugin: %s is one plugin's configuration, and %s, which the list of both would be, is there: remove one of them", f.path, list)
	}
	if err := os.Rename(f.path, f.path+aside); err != nil {
		return nil, fmt.Errorf("chain the plugin: %w", err)
	}
	return []string{"entry in " + list, f.path + " aside as " + f.path + aside}, syncDir(i.ConfDir)
}

// listName is the file of the list that stands for a lone plugin's configuration.
func listName(conf string) string { return strings.TrimSuffix(conf, filepath.Ext(conf)) + ".conflist" }

// standsFor tells whether a list is what convert made of the configuration in a file.
func standsFor(list []byte, conf, plugin string) bool {
	text, err := contents(conf)
	if err != nil {
		return false
	}
	made, err := listOf(text, []byte(`{"type":"`+plugin+`"}`))
	if err != nil {
		return false
	}
	return same(unchained(list, plugin), unchained(made, plugin))
}

// unchained is a list without the plugin; nothing, which is the same as nothing else, where it is none.
func unchained(list []byte, plugin string) []byte {
	parsed, err := parseList(list)
	if err != nil {
		return nil
	}
	text, err := parsed.without(plugin)
	if err != nil {
		return nil
	}
	return text
}

// Run installs, and again whenever something changed: a primary CNI writes its configuration anew when it is upgraded and at each boot.
// It says what it does and what keeps it from it, and ends with ctx, leaving everything as it is.
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
			for _, dir := range []string{i.ConfDir, i.BinDir} {
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

// look installs, says what came of it, and tells when to look again.
func (i *Installer) look() time.Duration {
	did, err := i.Install()
	if len(did) > 0 {
		i.Log.Info("installed", "did", did)
	}
	next, said := i.Interval, ""
	switch {
	case errors.Is(err, ErrUnsettled):
		return unsettled // which says nothing yet
	case errors.Is(err, ErrNoNetwork):
		next, said = min(i.Interval, time.Second), err.Error()
		if said != i.waiting {
			i.Log.Info("waiting for the primary CNI to write its network configuration", "directory", i.ConfDir)
		}
	case err != nil:
		said = err.Error()
		if said != i.waiting {
			i.Log.Error("the plugin is not chained: new pods get no credentials, and are not kept from the node's; trying again", "error", err)
		}
	case i.waiting != "":
		i.Log.Info("the plugin is chained")
	}
	i.waiting = said
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
