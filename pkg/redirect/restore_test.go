package redirect

import (
	"strings"
	"testing"
)

// notWords are what iptables-restore reads as several words, as another line, or as another word.
var notWords = []string{"", "a b", "a\nb", "a\n-A PREROUTING -j ACCEPT", "a\tb", "a\rb", "a\x00b", `a"b`, "a'b", `a\b`, "a\u00a0b", "a\x7f"}

// TestScriptsAreOfWords has a rule's words come from a record or from the kernel that no word of a script may be.
func TestScriptsAreOfWords(t *testing.T) {
	for _, word := range notWords {
		for name, r := range map[string]rule{
			"an option's value": {table: "nat", chain: Chain, spec: []string{"-i", word, "-j", "DNAT"}},
			"a table":           {table: word, chain: Chain, spec: []string{"-j", "DNAT"}},
			"a chain":           {table: "nat", chain: word, spec: []string{"-j", "DNAT"}},
		} {
			s := new(script)
			s.add("-A", rule{table: "nat", chain: Chain, spec: []string{"-i", "veth1", "-j", "DNAT"}})
			s.add("-D", r)
			s.add("-A", rule{table: "nat", chain: Chain, spec: []string{"-i", "veth2", "-j", "DNAT"}})
			if s.err == nil || strings.Contains(s.err.Error(), "\n") {
				t.Errorf("%q as %s: got %v, want an error of one line", word, name, s.err)
			}
			t0 := &IPTables{form: NFT, find: func(Form, bool) (string, error) {
				t.Errorf("%q as %s: a command is looked for", word, name)
				return "", nil
			}}
			if err := t0.restore(t.Context(), false, s); err != s.err {
				t.Errorf("%q as %s: the script runs: %v", word, name, err)
			}
		}
	}
}

// TestAttachmentsAreOfWords has each backend refuse them before anything runs.
func TestAttachmentsAreOfWords(t *testing.T) {
	for _, word := range append(notWords, strings.Repeat("v", 16)) {
		a := routed("c1@eth0", word, "10.1.0.5")
		if a.validate() == nil {
			t.Errorf("the host interface %q is accepted", word)
		}
		if a.ID, a.HostLink = word, "veth0"; len(word) != 16 && a.validate() == nil {
			t.Errorf("the identity %q is accepted", word)
		}
	}
}
