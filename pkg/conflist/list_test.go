package conflist

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const own = `{"type": "kube2iam-cni"}`

func TestEntryIsChainedAndTheRestStaysAsItIs(t *testing.T) {
	for name, c := range map[string]struct{ before, after string }{
		"on one line":              {`{"name":"a","plugins":[{"type":"bridge"}]}`, `{"name":"a","plugins":[{"type":"bridge"},` + own + `]}`},
		"after the last":           {`{"plugins":[{"type":"bridge"}, {"type":"portmap"}]}`, `{"plugins":[{"type":"bridge"}, {"type":"portmap"}, ` + own + `]}`},
		"indented":                 {"{\n  \"plugins\": [\n    {\n      \"type\": \"ptp\"\n    }\n  ]\n}\n", "{\n  \"plugins\": [\n    {\n      \"type\": \"ptp\"\n    },\n    " + own + "\n  ]\n}\n"},
		"a comma on its own line":  {"{\"plugins\": [\n {\"type\":\"a\"}\n , {\"type\":\"b\"}]}", "{\"plugins\": [\n {\"type\":\"a\"}\n , {\"type\":\"b\"}, " + own + "]}"},
		"keys that nobody knows":   {`{"x":{"plugins":[1]},"plugins":[{"type":"a","n":1.50,"big":12345678901234567890}],"y":"plugins"}`, `{"x":{"plugins":[1]},"plugins":[{"type":"a","n":1.50,"big":12345678901234567890},` + own + `],"y":"plugins"}`},
		"a key twice":              {`{"plugins":[],"plugins":[{"type":"a"}]}`, `{"plugins":[],"plugins":[{"type":"a"},` + own + `]}`},
		"there":                    {`{"plugins":[{"type":"a"},{ "type":"kube2iam-cni" }]}`, `{"plugins":[{"type":"a"},{ "type":"kube2iam-cni" }]}`},
		"there before another":     {`{"plugins":[{"type":"a"},` + own + `,{"type":"b"}]}`, `{"plugins":[{"type":"a"},` + own + `,{"type":"b"}]}`},
		"with other values":        {`{"plugins":[{"type":"a"},{"type":"kube2iam-cni","proxyPort":1},{"type":"b"}]}`, `{"plugins":[{"type":"a"},` + own + `,{"type":"b"}]}`},
		"first":                    {`{"plugins":[` + own + `, {"type":"a"}]}`, `{"plugins":[{"type":"a"},` + own + `]}`},
		"twice":                    {`{"plugins":[{"type":"a"},` + own + `,` + own + `]}`, `{"plugins":[{"type":"a"},` + own + `]}`},
		"a string that looks like": {`{"plugins":[{"type":"a","x":"],\"plugins\":["}]}`, `{"plugins":[{"type":"a","x":"],\"plugins\":["},` + own + `]}`},
	} {
		t.Run(name, func(t *testing.T) {
			before, err := parseList([]byte(c.before))
			if err != nil {
				t.Fatal(err)
			}
			got, err := before.insert(plugin, []byte(own))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.after, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			after, err := parseList(got)
			if err != nil {
				t.Fatalf("what it wrote: %v", err)
			}
			if again, err := after.insert(plugin, []byte(own)); err != nil || string(again) != string(got) {
				t.Errorf("chained again: %v, %s", err, again)
			}
			if left, err := after.remove(plugin); err != nil || !strings.Contains(c.before, "kube2iam-cni") && string(left) != c.before {
				t.Errorf("unchained it is not what it was:\n%s", cmp.Diff(c.before, string(left)))
			}
		})
	}
}

func TestTextThatIsNoListIsRefused(t *testing.T) {
	for name, text := range map[string]string{
		"nothing": "", "a list": "[]", "a part": `{"plugins":[{"type":"a"}`, "no plugins": `{"name":"a"}`, "plugins that are none": `{"plugins":{}}`,
		"more behind it": `{"plugins":[]}{}`, "garbage behind it": `{"plugins":[]}x`, "plugins are null": `{"plugins":null}`,
	} {
		if c, err := parseList([]byte(text)); err == nil {
			t.Errorf("%s: %v", name, c)
		}
	}
	for name, text := range map[string]string{"empty": `{"plugins":[]}`, "ours alone": `{"plugins":[` + own + `]}`} {
		c, err := parseList([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.insert(plugin, []byte(own)); err == nil {
			t.Errorf("%s: %s", name, got)
		}
	}
}

func TestListOfALonePlugin(t *testing.T) {
	conf := "{\n  \"cniVersion\": \"0.4.0\", \"name\": \"a \\\"b\\\"\", \"type\": \"bridge\", \"x\": 1.0\n}\n"
	got, err := generate([]byte(conf), []byte(own))
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		CNIVersion, Name string
		Plugins          []json.RawMessage
	}
	if err := json.Unmarshal(got, &list); err != nil {
		t.Fatalf("%v: %s", err, got)
	}
	if list.CNIVersion != "0.4.0" || list.Name != `a "b"` || len(list.Plugins) != 2 || !equalJSON(list.Plugins[0], []byte(conf)) || string(list.Plugins[1]) != own {
		t.Errorf("%s", got)
	}
	if _, err := generate([]byte(`{"type":"bridge"}`), []byte(own)); err == nil {
		t.Error("a network without a name was taken")
	}
}

// FuzzChain has any text that is taken for a list stay one, and the same one once the entry is out again.
func FuzzChain(f *testing.F) {
	for _, text := range []string{`{"name":"a","plugins":[{"type":"bridge"}]}`, "{\"plugins\": [\n {\"type\":\"a\"}\n , {\"type\":\"b\"}]}", `{"plugins":[` + own + `,1]}`, `{"plugins":[],"plugins":[""]}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := parseList(text)
		if err != nil {
			return
		}
		got, err := c.insert(plugin, []byte(own))
		if err != nil {
			return
		}
		after, err := parseList(got)
		if err != nil {
			t.Fatalf("%q became %q: %v", text, got, err)
		}
		if n := len(after.indexes(plugin)); n != 1 {
			t.Fatalf("%q became %q, which has it %d times", text, got, n)
		}
		if left, err := after.remove(plugin); err != nil || len(c.indexes(plugin)) == 0 && string(left) != string(text) {
			t.Fatalf("%q was %q without it: %v", left, text, err)
		}
	})
}
