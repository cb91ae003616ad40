package conflist

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const entry = `{"type": "kube2iam-cni"}`

func TestInsertChangesNothingElse(t *testing.T) {
	for name, c := range map[string]struct{ before, after string }{
		"on one line":               {`{"name":"a","plugins":[{"type":"bridge"}]}`, `{"name":"a","plugins":[{"type":"bridge"},` + entry + `]}`},
		"after the last":            {`{"plugins":[{"type":"bridge"}, {"type":"portmap"}]}`, `{"plugins":[{"type":"bridge"}, {"type":"portmap"}, ` + entry + `]}`},
		"indented":                  {"{\n  \"plugins\": [\n    {\n      \"type\": \"ptp\"\n    }\n  ]\n}\n", "{\n  \"plugins\": [\n    {\n      \"type\": \"ptp\"\n    },\n    " + entry + "\n  ]\n}\n"},
		"a comma on its entry line": {"{\"plugins\": [\n {\"type\":\"a\"}\n , {\"type\":\"b\"}]}", "{\"plugins\": [\n {\"type\":\"a\"}\n , {\"type\":\"b\"}, " + entry + "]}"},
		"unknown keys":              {`{"x":{"plugins":[1]},"plugins":[{"type":"a","n":1.50,"big":12345678901234567890}],"y":"plugins"}`, `{"x":{"plugins":[1]},"plugins":[{"type":"a","n":1.50,"big":12345678901234567890},` + entry + `],"y":"plugins"}`},
		"a key twice":               {`{"plugins":[],"plugins":[{"type":"a"}]}`, `{"plugins":[],"plugins":[{"type":"a"},` + entry + `]}`},
		"chained":                   {`{"plugins":[{"type":"a"},{ "type":"kube2iam-cni" }]}`, `{"plugins":[{"type":"a"},{ "type":"kube2iam-cni" }]}`},
		"chained in the middle":     {`{"plugins":[{"type":"a"},` + entry + `,{"type":"b"}]}`, `{"plugins":[{"type":"a"},` + entry + `,{"type":"b"}]}`},
		"with other values":         {`{"plugins":[{"type":"a"},{"type":"kube2iam-cni","proxyPort":1},{"type":"b"}]}`, `{"plugins":[{"type":"a"},{"type":"b"},` + entry + `]}`},
		"first":                     {`{"plugins":[` + entry + `, {"type":"a"}]}`, `{"plugins":[{"type":"a"},` + entry + `]}`},
		"twice":                     {`{"plugins":[{"type":"a"},` + entry + `,` + entry + `]}`, `{"plugins":[{"type":"a"},` + entry + `]}`},
		"a string like a list":      {`{"plugins":[{"type":"a","x":"],\"plugins\":["}]}`, `{"plugins":[{"type":"a","x":"],\"plugins\":["},` + entry + `]}`},
	} {
		t.Run(name, func(t *testing.T) {
			before, err := parseList([]byte(c.before))
			if err != nil {
				t.Fatal(err)
			}
			got, err := before.insert(plugin, []byte(entry))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.after, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			after, err := parseList(got)
			if err != nil {
				t.Fatalf("the new text: %v", err)
			}
			if again, err := after.insert(plugin, []byte(entry)); err != nil || string(again) != string(got) {
				t.Errorf("inserted again: %v, %s", err, again)
			}
			if rest, err := after.remove(plugin); err != nil || !strings.Contains(c.before, "kube2iam-cni") && string(rest.text) != c.before {
				t.Errorf("remove does not restore the text: %v\n%s", err, cmp.Diff(c.before, string(rest.text)))
			}
		})
	}
}

func TestParseListRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "an array": "[]", "cut off": `{"plugins":[{"type":"a"}`, "no plugins": `{"name":"a"}`, "plugins are an object": `{"plugins":{}}`,
		"a second value": `{"plugins":[]}{}`, "trailing text": `{"plugins":[]}x`, "plugins are null": `{"plugins":null}`,
	} {
		if c, err := parseList([]byte(text)); err == nil {
			t.Errorf("%s: %v", name, c)
		}
	}
	for name, text := range map[string]string{"empty": `{"plugins":[]}`, "no other plugin": `{"plugins":[` + entry + `]}`} {
		c, err := parseList([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.insert(plugin, []byte(entry)); err == nil {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// FuzzInsert looks for a list that is invalid after insert, or another one after insert and remove.
func FuzzInsert(f *testing.F) {
	for _, text := range []string{`{"name":"a","plugins":[{"type":"bridge"}]}`, "{\"plugins\": [\n {\"type\":\"a\"}\n , {\"type\":\"b\"}]}", `{"plugins":[` + entry + `,1]}`, `{"plugins":[],"plugins":[""]}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := parseList(text)
		if err != nil {
			return
		}
		got, err := c.insert(plugin, []byte(entry))
		if err != nil {
			return
		}
		after, err := parseList(got)
		if err != nil {
			t.Fatalf("%q became %q: %v", text, got, err)
		}
		if n := len(after.indexes(plugin)); n != 1 {
			t.Fatalf("%q became %q, which has the entry %d times", text, got, n)
		}
		if rest, err := after.remove(plugin); err != nil || len(c.indexes(plugin)) == 0 && string(rest.text) != string(text) {
			t.Fatalf("remove made %q of %q: %v", rest.text, text, err)
		}
	})
}

// TestEqualEntryStays has an operator write the entry with other key order and white space, for
// example in Cilium's cni.configMap.
func TestEqualEntryStays(t *testing.T) {
	const entry = `{"type":"kube2iam-cni","proxyPort":8181,"big":9007199254740993}`
	for written, stays := range map[string]bool{
		`{ "big": 9007199254740993, "proxyPort": 8181, "type": "kube2iam-cni" }`: true,
		`{"type":"kube2iam-cni","proxyPort":8181,"big":9007199254740992}`:        false,
	} {
		text := `{"plugins":[{"type":"cilium-cni"},` + written + `,{"type":"portmap"}]}`
		before, err := parseList([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := before.insert(plugin, []byte(entry)); err != nil || (string(got) == text) != stays {
			t.Errorf("stays %v: %s, %v", stays, got, err)
		}
	}
}
