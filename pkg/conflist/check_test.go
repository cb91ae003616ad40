package conflist

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestWatchOnlyLooksWhereRuntimesLook holds when the entry counts as chained, and that nothing is changed.
func TestWatchOnlyLooksWhereRuntimesLook(t *testing.T) {
	const (
		bare    = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`
		chained = `{"cniVersion":"1.0.0","name":"b","plugins":[{"type":"bridge"},{"type":"` + plugin + `"}]}`
		multus  = `{"cniVersion":"1.0.0","name":"m","type":"multus-shim"}`
	)
	for name, tt := range map[string]struct {
		files map[string]string
		want  error
	}{
		"nothing":                        {nil, ErrNoNetwork},
		"chained":                        {map[string]string{"10-b.conflist": chained}, nil},
		"not chained":                    {map[string]string{"10-a.conflist": bare}, ErrNotChained},
		"chained in the second file":     {map[string]string{"10-a.conflist": bare, "20-b.conflist": chained}, ErrNotChained},
		"the first file is broken":       {map[string]string{"05-x.conflist": "{", "10-b.conflist": chained}, nil},
		"a lone plugin":                  {map[string]string{"10-a.conf": `{"name":"a","type":"bridge"}`}, ErrNotChained},
		"a list made for a lone plugin":  {map[string]string{"10-a.conf": `{"name":"a","type":"bridge"}`, "10-a-conf-" + plugin + ".conflist": chained}, nil},
		"an entry in a file of its own":  {map[string]string{"10-a.conflist": bare, "a/10-own.conf": `{"type":"` + plugin + `"}`}, nil},
		"Multus delegates to a chain":    {map[string]string{"00-multus.conf": multus, "10-b.conflist": chained}, nil},
		"Multus delegates to no chain":   {map[string]string{"00-multus.conf": multus, "10-a.conflist": bare}, ErrNotChained},
		"Multus, as a list, and a chain": {map[string]string{"00-multus.conflist": `{"cniVersion":"1.0.0","name":"m","plugins":[{"type":"multus"}]}`, "10-b.conflist": chained}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, tt.files)
			h.WatchOnly = true
			before := h.files()
			did, err := h.Install()
			if !errors.Is(err, tt.want) || len(did) > 0 {
				t.Errorf("it did %q, %v; want %v", did, err, tt.want)
			}
			if diff := cmp.Diff(before, h.files()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestMissingEntryIsWarnedOfOncePerChange(t *testing.T) {
	h := newHost(t, nil)
	var log bytes.Buffer
	h.WatchOnly, h.Log = true, slog.New(slog.NewTextHandler(&log, nil))
	var last error
	h.Installed = func(err error) { last = err }
	for times := 1; times <= 3; times++ {
		h.put("10-a.conflist", `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`)
		for range 5 {
			h.installAndLog()
		}
		if count := strings.Count(log.String(), "the entry is missing"); count != times || !errors.Is(last, ErrNotChained) {
			t.Errorf("missing for the %d. time: %v and %d warnings:\n%s", times, last, count, &log)
		}
		h.put("10-a.conflist", `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"},{"type":"`+plugin+`"}]}`)
		for range 5 {
			h.installAndLog()
		}
		if count := strings.Count(log.String(), `"the plugin is chained"`); count != times || last != nil {
			t.Errorf("chained for the %d. time: %v and %d lines:\n%s", times, last, count, &log)
		}
	}
}
