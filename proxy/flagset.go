package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

// flagSet is the program's flags, in categories, each of which can be given in the environment too.
//
// It is pflag's, as kube2iam's are: urfave/cli, which the plugin has, prints its help by text/template, and that has the linker keep every
// method of every type, four megabytes of this program.
type flagSet struct {
	*pflag.FlagSet
	categories []string
	of         map[string]*pflag.FlagSet // by category
	env        map[string][]string       // by flag
	lists      map[string]*[]string      // by flag: pflag's own word for a list of one empty string is none
}

func newFlagSet() *flagSet {
	f := &flagSet{FlagSet: pflag.NewFlagSet("kube2iam-proxy", pflag.ContinueOnError), of: make(map[string]*pflag.FlagSet), env: make(map[string][]string), lists: make(map[string]*[]string)}
	f.SortFlags = false
	f.Usage = func() {}
	f.BoolP("help", "h", false, "show this")
	f.BoolP("version", "v", false, "print the version")
	return f
}

// The helpers keep the table of flags readable: one line of name, default and meaning each.
func (f *flagSet) str(category, name, value, usage string, moreEnv ...string) {
	f.category(category, name, moreEnv).String(name, value, f.usage(name, usage))
	f.added(category, name)
}

func (f *flagSet) boolean(category, name, usage string) {
	f.category(category, name, nil).Bool(name, false, f.usage(name, usage))
	f.added(category, name)
}

func (f *flagSet) duration(category, name string, value time.Duration, usage string) {
	f.category(category, name, nil).Duration(name, value, f.usage(name, usage))
	f.added(category, name)
}

// list is a flag that may be given many times; a comma is a part of its value.
func (f *flagSet) list(category, name, usage string) {
	f.lists[name] = f.category(category, name, nil).StringArray(name, nil, f.usage(name, usage))
	f.added(category, name)
}

// category is where a flag belongs that has these variables besides KUBE2IAM_ and its name in capitals.
func (f *flagSet) category(category, name string, moreEnv []string) *pflag.FlagSet {
	if f.of[category] == nil {
		f.of[category] = pflag.NewFlagSet(category, pflag.ContinueOnError)
		f.of[category].SortFlags = false
		f.categories = append(f.categories, category)
	}
	f.env[name] = append([]string{"KUBE2IAM_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))}, moreEnv...)
	return f.of[category]
}

func (f *flagSet) usage(name, usage string) string {
	return usage + " [$" + strings.Join(f.env[name], ", $") + "]"
}

func (f *flagSet) added(category, name string) { f.AddFlag(f.of[category].Lookup(name)) }

// parse reads the arguments and, for what they do not say, the environment. The error is pflag.ErrHelp where help is asked for.
func (f *flagSet) parse(args []string) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.is("help") {
		return pflag.ErrHelp
	}
	var err error
	f.VisitAll(func(flag *pflag.Flag) {
		at := slices.IndexFunc(f.env[flag.Name], func(name string) bool { _, given := os.LookupEnv(name); return given })
		if err != nil || flag.Changed || at < 0 {
			return
		}
		name := f.env[flag.Name][at]
		value := os.Getenv(name)
		if value == "" && flag.Value.Type() != "string" {
			return
		}
		if wrong := f.Set(flag.Name, value); wrong != nil {
			err = fmt.Errorf("$%s: %w", name, wrong)
		}
	})
	return err
}

// These are the values of flags that are there, of their type.
func (f *flagSet) text(name string) string        { return known(f.GetString(name)) }
func (f *flagSet) is(name string) bool            { return known(f.GetBool(name)) }
func (f *flagSet) span(name string) time.Duration { return known(f.GetDuration(name)) }
func (f *flagSet) all(name string) []string       { return *f.lists[name] }

func known[T any](value T, err error) T {
	if err != nil {
		panic(err) // a name that is not in the table
	}
	return value
}

// help prints what the program is, and each flag.
func (f *flagSet) help(w io.Writer) {
	fmt.Fprintf(w, "kube2iam-proxy - %s\n\nUsage:\n   kube2iam-proxy [flags]\n", summary)
	for _, name := range []string{"ready", "live"} {
		fmt.Fprintf(w, "   kube2iam-proxy %-5s [--state-dir DIR]   %s\n", name, probeCommands[name].summary)
	}
	fmt.Fprintf(w, "\n%s\n", description)
	for _, category := range f.categories {
		fmt.Fprintf(w, "\n%s:\n%s", category, f.of[category].FlagUsages())
	}
	fmt.Fprintf(w, "\nOther:\n  -h, --help      show this\n  -v, --version   print the version\n")
}
