package hostlink

import (
	"errors"
	"os/exec"
	"strings"
	"testing"
)

func TestFreeMark(t *testing.T) {
	for name, tc := range map[string]struct {
		rules []string // of "ip rule add"
		mark  uint32
		said  string // of the rule that asks for it; none where the mark is free
	}{
		"no rule for marks":              {[]string{"from 10.1.0.0/16 lookup 100 priority 100"}, 0x1000, ""},
		"the mark":                       {[]string{"fwmark 0x1000 lookup 100 priority 100"}, 0x1000, "ip rule 100, fwmark 0x1000/0xffffffff"},
		"another mark":                   {[]string{"fwmark 0x2000 lookup 100"}, 0x1000, ""},
		"the mark and a bit more":        {[]string{"fwmark 0x1001 lookup 100"}, 0x1000, ""},
		"a mask of its bit":              {[]string{"fwmark 0x1000/0x1000 lookup 100 priority 100"}, 0x1000, "ip rule 100, fwmark 0x1000/0x1000"},
		"a mask that it is part of":      {[]string{"fwmark 0x1000/0xf000 lookup 100 priority 100"}, 0x1000, "ip rule 100, fwmark 0x1000/0xf000"},
		"a mask that wants more bits":    {[]string{"fwmark 0x3000/0xf000 lookup 100"}, 0x1000, ""},
		"a mask of other bits":           {[]string{"fwmark 0x80/0x80 lookup 100"}, 0x1000, ""},
		"one of several bits":            {[]string{"fwmark 0x80/0x80 lookup 100 priority 100"}, 0x1080, "ip rule 100, fwmark 0x80/0x80"},
		"all of several bits":            {[]string{"fwmark 0x1080/0x1080 lookup 100 priority 100"}, 0x1080, "ip rule 100, fwmark 0x1080/0x1080"},
		"the second rule":                {[]string{"fwmark 0x80/0x80 lookup 100 priority 100", "fwmark 0x1000/0x1000 lookup 101 priority 101"}, 0x1000, "ip rule 101, fwmark 0x1000/0x1000"},
		"whoever does not have the mark": {[]string{"fwmark 0/0x1000 lookup 100"}, 0x1000, ""},
		"a rule of IPv6":                 {[]string{"-6 fwmark 0x1000/0x1000 lookup 100 priority 100"}, 0x1000, "ip rule 100, fwmark 0x1000/0x1000"},
		"the AWS VPC CNI's":              {[]string{"fwmark 0x80/0x80 lookup main"}, 0x1000, ""},
		"Cilium's":                       {[]string{"fwmark 0x200/0xf00 lookup 2004", "fwmark 0xa00/0xa00 lookup 2005"}, 0x1000, ""},
		"WireGuard's":                    {[]string{"not fwmark 0xca6c lookup 51820"}, 0x1000, ""},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			for _, r := range tc.rules {
				family, rule, v6 := strings.Cut(r, "-6 ")
				args := append([]string{"rule", "add"}, strings.Fields(family)...)
				if v6 {
					args = append([]string{"-6", "rule", "add"}, strings.Fields(rule)...)
				}
				if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
					n.Fatalf("ip %v: %v\n%s", args, err, out)
				}
			}
			err := FreeMark(tc.mark)
			said := ""
			if taken, ok := errors.AsType[*MarkError](err); ok {
				said = taken.Rule
				if taken.Mark != tc.mark || !strings.Contains(err.Error(), said) {
					t.Errorf("got %v", err)
				}
			} else if err != nil {
				t.Errorf("got %v, want a *MarkError or none", err)
			}
			if said != tc.said {
				t.Errorf("got %q, want %q", said, tc.said)
			}
		})
	}
}
