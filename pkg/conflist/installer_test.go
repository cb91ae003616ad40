package conflist

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	generated    = "10-a-conf-kube2iam-cni.conflist"
	single       = `{"cniVersion":"0.4.0","name":"a","type":"bridge"}`
	singlePTP    = `{"cniVersion":"0.4.0","name":"a","type":"ptp"}`
	singleAsList = `{"cniVersion":"0.4.0","name":"a","plugins":[` + single + `,` + entry + `]}`
)

func TestInstallChainsTheEffectiveConfiguration(t *testing.T) {
	bridge, chained := chain("a", "bridge"), strings.Replace(chain("a", "bridge"), "]", ","+entry+"]", 1)
	ptpAsList := strings.Replace(singleAsList, "bridge", "ptp", 1)
	type files map[string]string
	for name, tt := range map[string]struct {
		before, after files
		changes       int
		err           error
		message       string // in the error
	}{
		"a list": {files{"10-a.conflist": bridge}, files{"10-a.conflist": chained}, 2, nil, ""},
		"the first of two lists": {
			files{"10-a.conflist": bridge, "05-b.conflist": bridge}, files{"10-a.conflist": bridge, "05-b.conflist": chained}, 2, nil, "",
		},
		"the first valid list": {
			files{"05-b.conflist": `{"name":"b","plugins":[`, "06-c.conflist": `{"plugins":[{"type":"x"}]}`, "07-d.conf": `{}`, "10-a.conflist": bridge},
			files{"05-b.conflist": `{"name":"b","plugins":[`, "06-c.conflist": `{"plugins":[{"type":"x"}]}`, "07-d.conf": `{}`, "10-a.conflist": chained}, 2, nil, "",
		},
		"a list with the entry":      {files{"10-a.conflist": chained}, files{"10-a.conflist": chained}, 1, nil, ""},
		"no configuration":           {files{"10-a.conflist.bak": bridge, "README": ""}, files{"10-a.conflist.bak": bridge, "README": ""}, 1, ErrNoNetwork, ""},
		"no valid configuration":     {files{"10-a.conflist": "{"}, files{"10-a.conflist": "{"}, 1, ErrNoNetwork, "10-a.conflist"},
		"a single plugin":            {files{"10-a.conf": single}, files{generated: singleAsList, "10-a.conf": single}, 2, nil, ""},
		"a single plugin and a list": {files{"10-a.conf": single, "10-a.conflist": bridge}, files{generated: singleAsList, "10-a.conf": single, "10-a.conflist": bridge}, 2, nil, ""},
		"a generated list":           {files{"10-a.conf": single, generated: singleAsList}, files{generated: singleAsList, "10-a.conf": single}, 1, nil, ""},
		"a generated list of earlier content": {
			files{"10-a.conf": singlePTP, generated: singleAsList}, files{generated: ptpAsList, "10-a.conf": singlePTP}, 2, nil, "",
		},
		"a generated list without its file, and a list": {files{"20-b.conflist": bridge, generated: singleAsList}, files{"20-b.conflist": chained}, 3, nil, ""},
		"a generated list without its file":             {files{generated: singleAsList}, files{}, 2, ErrNoNetwork, ""},
		"a list before a generated one": {
			files{"05-b.conflist": bridge, "10-a.conf": single, generated: singleAsList}, files{"05-b.conflist": chained, "10-a.conf": single}, 3, nil, "",
		},
		"a single plugin before a generated list": {
			files{"05-b.json": singlePTP, "10-a.conf": single, generated: singleAsList},
			files{"05-b-json-kube2iam-cni.conflist": ptpAsList, "05-b.json": singlePTP, "10-a.conf": single}, 3, nil, "",
		},
		"no other plugin": {files{"10-a.conflist": chain("a", plugin)}, files{"10-a.conflist": chain("a", plugin)}, 1, nil, "makes an interface"},
		"an entry in the network's directory": {
			files{"10-a.conflist": bridge, "a/50.conf": entry}, files{"10-a.conflist": bridge}, 1, nil, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, tt.before)
			changes, err := n.Install()
			switch {
			case tt.err != nil && !errors.Is(err, tt.err), tt.message != "" && (err == nil || !strings.Contains(err.Error(), tt.message)),
				tt.err == nil && tt.message == "" && err != nil:
				t.Errorf("error %v, want %v %q", err, tt.err, tt.message)
			}
			if len(changes) != tt.changes {
				t.Errorf("changes %q, want %d", changes, tt.changes)
			}
			n.wantFiles(tt.after)
			text, err := os.ReadFile(filepath.Join(n.BinDir, plugin))
			if err != nil || string(text) != binary {
				t.Errorf("the binary: %q, %v", text, err)
			}
			if changes, _ := n.Install(); len(changes) != 0 {
				t.Errorf("changes of the second call: %q", changes)
			}
		})
	}
}

// TestGeneratedListHasThePlugin covers a configuration with other keys, white space and escapes.
func TestGeneratedListHasThePlugin(t *testing.T) {
	const config = "{\n  \"cniVersion\": \"0.4.0\", \"name\": \"a \\\"b\\\"\", \"type\": \"bridge\", \"mtu\": 1500, \"x\": [1.5], \"id\": 9007199254740993, \"y\": 1.0\n}\n"
	n := newNode(t, map[string]string{"10-a.conf": config})
	if _, err := n.Install(); err != nil {
		t.Fatal(err)
	}
	var list struct {
		CNIVersion, Name string
		Plugins          []any
	}
	n.must(json.Unmarshal([]byte(n.files()[generated]), &list))
	var want, wantEntry any
	n.must(errors.Join(json.Unmarshal([]byte(config), &want), json.Unmarshal([]byte(entry), &wantEntry)))
	if list.CNIVersion != "0.4.0" || list.Name != `a "b"` || !cmp.Equal(list.Plugins, []any{want, wantEntry}) {
		t.Errorf("got %+v", list)
	}
	for _, number := range []string{"9007199254740993", "1.0"} { // a float64 cannot have them
		if text := n.files()[generated]; !strings.Contains(text, number) {
			t.Errorf("no %s in %s", number, text)
		}
	}
}

// TestInvalidFileIsUnsettledForAMoment includes a modification time in the future: the clock was
// set.
func TestInvalidFileIsUnsettledForAMoment(t *testing.T) {
	now := time.Now()
	for name, tt := range map[string]struct {
		written   time.Time
		unsettled bool
	}{
		"now":                {now, true},
		"almost settled":     {now.Add(time.Millisecond - settleTime), true},
		"settled":            {now.Add(-settleTime), false},
		"long ago":           {now.Add(-time.Hour), false},
		"before a clock set": {now.Add(time.Hour), false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, map[string]string{"05-x.conflist": "{invalid", "10-a.conflist": chain("a", "bridge")})
			n.must(os.Chtimes(n.path("05-x.conflist"), tt.written, tt.written))
			_, err := n.chain(now)
			if errors.Is(err, ErrUnsettled) != tt.unsettled || !tt.unsettled && err != nil {
				t.Errorf("error %v", err)
			}
			if Has([]byte(n.files()["10-a.conflist"]), plugin) == tt.unsettled {
				t.Errorf("the next list is %s", n.files()["10-a.conflist"])
			}
		})
	}
}

// TestEntryIsNotAddedWithoutTheBinary has a file in place of the directory of the plugins'
// binaries. With the entry alone, the runtime would fail each pod.
func TestEntryIsNotAddedWithoutTheBinary(t *testing.T) {
	before := map[string]string{"10-a.conflist": chain("a", "bridge")}
	n := newNode(t, before)
	n.BinDir = n.path("10-a.conflist")
	if _, err := n.Install(); err == nil {
		t.Error("no error")
	}
	n.wantFiles(before)
}

// TestWatchOnlyReadsAsRuntimesDo covers when the entry counts as chained, and that nothing is
// changed.
func TestWatchOnlyReadsAsRuntimesDo(t *testing.T) {
	const (
		bare      = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`
		chained   = `{"cniVersion":"1.0.0","name":"b","plugins":[{"type":"bridge"},{"type":"` + plugin + `"}]}`
		multus    = `{"cniVersion":"1.0.0","name":"m","type":"multus-shim"}`
		multusAll = `{"cniVersion":"1.0.0","name":"m","plugins":[{"type":"multus"}]}`
	)
	for name, tt := range map[string]struct {
		files map[string]string
		want  error
	}{
		"no configuration":               {nil, ErrNoNetwork},
		"chained":                        {map[string]string{"10-b.conflist": chained}, nil},
		"not chained":                    {map[string]string{"10-a.conflist": bare}, ErrNotChained},
		"chained in the second file":     {map[string]string{"10-a.conflist": bare, "20-b.conflist": chained}, ErrNotChained},
		"an invalid first file":          {map[string]string{"05-x.conflist": "{", "10-b.conflist": chained}, nil},
		"a single plugin":                {map[string]string{"10-a.conf": single}, ErrNotChained},
		"a generated list":               {map[string]string{"10-a.conf": single, generated: chained}, nil},
		"in the network's directory":     {map[string]string{"10-a.conflist": bare, "a/10-own.conf": entry}, nil},
		"Multus and a chain":             {map[string]string{"00-multus.conf": multus, "10-b.conflist": chained}, nil},
		"Multus and no chain":            {map[string]string{"00-multus.conf": multus, "10-a.conflist": bare}, ErrNotChained},
		"Multus, as a list, and a chain": {map[string]string{"00-multus.conflist": multusAll, "10-b.conflist": chained}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, tt.files)
			n.WatchOnly = true
			before := n.files()
			changes, err := n.Install()
			if !errors.Is(err, tt.want) || len(changes) > 0 {
				t.Errorf("changes %q, error %v; want %v", changes, err, tt.want)
			}
			n.wantFiles(before)
		})
	}
}
