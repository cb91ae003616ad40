package roles

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestNamesAtTheirBounds(t *testing.T) {
	whole := "ns." + strings.Repeat("x", 61)
	if got := SessionName("ns", whole[3:]); got != whole {
		t.Errorf("one of 64 bytes is cut: %s", got)
	}
	for name, ok := range map[string]bool{
		"x=0123456789abcdef": false, "ns.x=0123456789abcdef": true, "x=0123456789abcdeg": true,
	} {
		if err := chosenSessionName(name, "ns"); (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := TagValue(strings.Repeat("ä", 256)); err != nil {
		t.Error(err)
	}
	for n, ok := range map[int]bool{1224: true, 1225: false} {
		if err := validExternalID(strings.Repeat("x", n)); (err == nil) != ok {
			t.Errorf("an external ID of %d: %v", n, err)
		}
	}
	frame := `{"Statement":""}`
	for n, ok := range map[int]bool{2048: true, 2049: false} {
		text := strings.Replace(frame, `""`, `"`+strings.Repeat("x", n-len(frame))+`"`, 1)
		if _, err := sessionPolicy(text); (err == nil) != ok {
			t.Errorf("a policy of %d: %v", len(text), err)
		}
	}
}

func TestProgramsAreBoundedHoweverTheyAreWritten(t *testing.T) {
	for name, patterns := range map[string][]string{
		"no end": {strings.Repeat("a{1000,}", 21)}, "letters": make([]string, 21),
	} {
		for i := range patterns {
			if patterns[i] == "" {
				patterns[i] = strings.Repeat("x", 1000)
			}
		}
		text, err := json.Marshal(patterns)
		if err != nil {
			t.Fatal(err)
		}
		r := &Restriction{Key: "allowed", Format: Regexp}
		if err := r.allows(map[string]string{"allowed": string(text)}, "arn:aws:iam::123456789012:role/a", ""); err == nil || !strings.Contains(err.Error(), "too large") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMalformedAnnotationsAreNotAllKept(t *testing.T) {
	r := &Restriction{Key: "allowed", Format: Regexp}
	for i := range 1000 {
		r.allows(map[string]string{"allowed": fmt.Sprint(i) + strings.Repeat("x", 8<<10)}, "arn", "")
	}
	if n := len(r.lists.known); n > 100 {
		t.Errorf("%d of 8 KiB are kept", n)
	}
}

func TestFirstMistakeIsTold(t *testing.T) {
	r := &Rules{RoleKey: "role", SessionNameKey: "session", ExternalIDKey: "id", Duration: time.Hour}
	_, err := r.Assumption(Subject{Namespace: "ns", Annotations: map[string]string{"role": "arn:aws:iam::123456789012:role/a", "session": "!", "id": "!"}})
	if e, ok := errors.AsType[*InvalidError](err); !ok || e.Key != "session" {
		t.Error(err)
	}
}
