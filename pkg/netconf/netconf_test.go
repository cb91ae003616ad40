package netconf

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

var addresses = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func defaults(change func(*Config)) *Config {
	c := &Config{
		CNIVersion: "1.1.0",
		Name:       "net",
		ProxyPort:  8181,
		MetadataIP: netip.MustParseAddr("169.254.169.254"),
		StateDir:   "/run/kube2iam-cni",
		Guard:      true,
		Mark:       DefaultMark,
	}
	if change != nil {
		change(c)
	}
	return c
}

func TestParse(t *testing.T) {
	for name, tc := range map[string]struct {
		stdin string
		want  *Config
	}{
		"nothing configured": {
			stdin: `{"cniVersion":"1.1.0","name":"net","type":"kube2iam-cni"}`,
			want:  defaults(nil),
		},
		"no version means 0.1.0": {
			stdin: `{"name":"net"}`,
			want:  defaults(func(c *Config) { c.CNIVersion = "0.1.0" }),
		},
		"everything configured": {
			stdin: `{"cniVersion":"1.1.0","name":"net","type":"kube2iam-cni","proxyIP":"10.0.0.1","proxyPort":65535,
				"metadataIP":"169.254.169.253","stateDir":"/var/run/x","backend":"iptables","guard":false,"mark":"0x20","datapath":"pod"}`,
			want: defaults(func(c *Config) {
				c.ProxyIP = netip.MustParseAddr("10.0.0.1")
				c.ProxyPort = 65535
				c.MetadataIP = netip.MustParseAddr("169.254.169.253")
				c.StateDir = "/var/run/x"
				c.Backend = attachment.BackendIPTables
				c.Guard = false
				c.Mark = 0x20
				c.Datapath = attachment.DatapathPod
			}),
		},
		"nftables": {
			stdin: `{"cniVersion":"1.1.0","name":"net","backend":"nftables"}`,
			want:  defaults(func(c *Config) { c.Backend = attachment.BackendNFTables }),
		},
		"an IPv6 proxy": {
			stdin: `{"cniVersion":"1.1.0","name":"net","proxyIP":"fd00::1"}`,
			want:  defaults(func(c *Config) { c.ProxyIP = netip.MustParseAddr("fd00::1") }),
		},
		"keys of runtimes": {
			stdin: `{"cniVersion":"1.1.0","name":"net","type":"kube2iam-cni","capabilities":{"portMappings":true},
				"runtimeConfig":{"portMappings":[]},"args":{"cni":{}},"ipam":{},"dns":{},"cni.dev/future":7}`,
			want: defaults(nil),
		},
		"GC": {
			stdin: `{"cniVersion":"1.1.0","name":"net","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}],
				"cni.dev/attachments":[{"containerID":"a","ifname":"eth0"}]}`,
			want: defaults(func(c *Config) { c.Valid = []types.GCAttachment{{ContainerID: "a", IfName: "eth0"}} }),
		},
		"GC without valid attachments": {
			stdin: `{"cniVersion":"1.1.0","name":"net","cni.dev/valid-attachments":null}`,
			want:  defaults(func(c *Config) { c.Valid = []types.GCAttachment{} }),
		},
		"no previous result": {
			stdin: `{"cniVersion":"1.1.0","name":"net","prevResult":null}`,
			want:  defaults(nil),
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse([]byte(tc.stdin))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got, addresses); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestKeyDefaultsAreThoseOfParse compares a configuration with the documented defaults and an empty
// one.
func TestKeyDefaultsAreThoseOfParse(t *testing.T) {
	explicit := map[string]any{"cniVersion": "1.1.0", "name": "net"}
	for _, k := range Keys {
		explicit[k.Name] = k.Default
	}
	text, err := json.Marshal(explicit)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(defaults(nil), got, addresses); diff != "" {
		t.Error(diff)
	}
}

func TestParsePrevResult(t *testing.T) {
	for _, tc := range []struct{ version, result string }{
		{"0.2.0", `{"ip4":{"ip":"10.1.0.5/24"}}`},
		{"0.3.1", `{"interfaces":[{"name":"eth0","sandbox":"/ns"}],"ips":[{"version":"4","interface":0,"address":"10.1.0.5/24"}]}`},
		{"0.4.0", `{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.1.0.5/24"}]}`},
		{"1.0.0", `{"cniVersion":"1.0.0","ips":[{"address":"10.1.0.5/24"}]}`},
		{"1.1.0", `{"cniVersion":"1.1.0","ips":[{"address":"10.1.0.5/24"}]}`},
	} {
		t.Run(tc.version, func(t *testing.T) {
			c, err := Parse([]byte(`{"cniVersion":"` + tc.version + `","name":"net","prevResult":` + tc.result + `}`))
			if err != nil {
				t.Fatal(err)
			}
			result, err := types100.NewResultFromResult(c.PrevResult)
			if err != nil {
				t.Fatal(err)
			}
			var ips []string
			for _, ip := range result.IPs {
				ips = append(ips, ip.Address.String())
			}
			if diff := cmp.Diff([]string{"10.1.0.5/24"}, ips); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		keys string // added to a valid configuration
		code uint
		want string // the whole message
	}{
		"unknown key":              {`"proxyip":"10.0.0.1"`, 7, `unknown key "proxyip"; the plugin's own keys are proxyIP, proxyPort, metadataIP, stateDir, backend, guard, mark, datapath`},
		"unknown keys":             {`"z":1,"a":2`, 7, `unknown key "a", "z"; the plugin's own keys are proxyIP, proxyPort, metadataIP, stateDir, backend, guard, mark, datapath`},
		"proxyIP: a number":        {`"proxyIP":7`, 7, `proxyIP: 7 is not a string`},
		"proxyIP: null":            {`"proxyIP":null`, 7, `proxyIP: null is not a string`},
		"proxyIP: a name":          {`"proxyIP":"node-1"`, 7, `proxyIP: "node-1" is not a plain IP address`},
		"proxyIP: empty":           {`"proxyIP":""`, 7, `proxyIP: "" is not a plain IP address`},
		"proxyIP: a prefix":        {`"proxyIP":"10.0.0.1/8"`, 7, `proxyIP: "10.0.0.1/8" is not a plain IP address`},
		"proxyIP: a zone":          {`"proxyIP":"fe80::1%eth0"`, 7, `proxyIP: "fe80::1%eth0" is not a plain IP address`},
		"proxyIP: mapped":          {`"proxyIP":"::ffff:10.0.0.1"`, 7, `proxyIP: "::ffff:10.0.0.1" is not a plain IP address`},
		"proxyIP: unspecified":     {`"proxyIP":"0.0.0.0"`, 7, `proxyIP: 0.0.0.0 is not the address of a machine that pods can reach`},
		"proxyIP: multicast":       {`"proxyIP":"ff02::1"`, 7, `proxyIP: ff02::1 is not the address of a machine that pods can reach`},
		"proxyIP: loopback":        {`"proxyIP":"127.0.0.1"`, 7, `proxyIP: 127.0.0.1 is not the address of a machine that pods can reach`},
		"proxyIP: the service":     {`"proxyIP":"169.254.169.254"`, 7, `proxyIP: 169.254.169.254 is metadataIP too`},
		"proxyPort: 0":             {`"proxyPort":0`, 7, `proxyPort: 0 is not a port from 1 to 65535`},
		"proxyPort: too large":     {`"proxyPort":65536`, 7, `proxyPort: 65536 is not a port from 1 to 65535`},
		"proxyPort: negative":      {`"proxyPort":-1`, 7, `proxyPort: -1 is not a port from 1 to 65535`},
		"proxyPort: a fraction":    {`"proxyPort":81.5`, 7, `proxyPort: 81.5 is not a port from 1 to 65535`},
		"proxyPort: a string":      {`"proxyPort":"8181"`, 7, `proxyPort: "8181" is not a port from 1 to 65535`},
		"proxyPort: a word":        {`"proxyPort":"http"`, 7, `proxyPort: "http" is not a port from 1 to 65535`},
		"metadataIP: IPv6":         {`"metadataIP":"fd00:ec2::254"`, 7, `metadataIP: fd00:ec2::254 is not an IPv4 address`},
		"metadataIP: loopback":     {`"metadataIP":"127.0.0.1"`, 7, `metadataIP: 127.0.0.1 is not the address of a machine that pods can reach`},
		"metadataIP: a list":       {`"metadataIP":["169.254.169.254"]`, 7, `metadataIP: ["169.254.169.254"] is not a string`},
		"metadataIP: broadcast":    {`"metadataIP":"255.255.255.255"`, 7, `metadataIP: 255.255.255.255 is not the address of a machine that pods can reach`},
		"stateDir: relative":       {`"stateDir":"run/x"`, 7, `stateDir: "run/x" is not an absolute, clean path`},
		"stateDir: not clean":      {`"stateDir":"/run/../etc"`, 7, `stateDir: "/run/../etc" is not an absolute, clean path`},
		"stateDir: a slash at end": {`"stateDir":"/run/x/"`, 7, `stateDir: "/run/x/" is not an absolute, clean path`},
		"stateDir: the root":       {`"stateDir":"/"`, 7, `stateDir: "/" is not an absolute, clean path`},
		"stateDir: a NUL":          {`"stateDir":"/run/\u0000"`, 7, `stateDir: "/run/\x00" is not an absolute, clean path`},
		"stateDir: true":           {`"stateDir":true`, 7, `stateDir: true is not a string`},
		"backend: unknown":         {`"backend":"ipvs"`, 7, `backend: "ipvs" is not "auto" or one of ["nftables" "iptables"]`},
		"backend: null":            {`"backend":null`, 7, `backend: null is not a string`},
		"guard: a string":          {`"guard":"true"`, 7, `guard: "true" is not true or false`},
		"mark: zero":               {`"mark":"0"`, 7, `mark: "0" is not a mark from 1 to 0xffffffff`},
		"mark: too large":          {`"mark":"0x100000000"`, 7, `mark: "0x100000000" is not a mark from 1 to 0xffffffff`},
		"mark: a word":             {`"mark":"blue"`, 7, `mark: "blue" is not a mark from 1 to 0xffffffff`},
		"mark: a number":           {`"mark":4096`, 7, `mark: 4096 is not a string`},
		"mark: null":               {`"mark":null`, 7, `mark: null is not a string`},
		"datapath: unknown":        {`"datapath":"veth"`, 7, `datapath: "veth" is not "auto" or one of ["pod"]`},
		"datapath: a number":       {`"datapath":1`, 7, `datapath: 1 is not a string`},
		"guard: null":              {`"guard":null`, 7, `guard: null is not true or false`},
		"GC: no list":              {`"cni.dev/valid-attachments":7`, 6, `network configuration: json: cannot unmarshal number into Go struct field PluginConf.cni.dev/valid-attachments of type []types.GCAttachment`},
		"prevResult: a number":     {`"prevResult":7`, 6, `network configuration: json: cannot unmarshal number into Go struct field PluginConf.prevResult of type map[string]interface {}`},
		"name: a number":           {`"name":7`, 6, `network configuration: json: cannot unmarshal number into Go struct field PluginConf.name of type string`},
		"prevResult: bad address":  {`"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"x"}]}`, 6, `prevResult: could not parse prevResult: invalid CIDR address: x`},
		"a long value is cut":      {`"backend":"` + strings.Repeat("x", 500) + `"`, 7, `backend: "` + strings.Repeat("x", 80) + `" is not "auto" or one of ["nftables" "iptables"]`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse([]byte(`{"cniVersion":"1.1.0","name":"net","type":"kube2iam-cni",` + tc.keys + `}`))
			wantCNIError(t, got, err, tc.code, tc.want)
		})
	}
}

func TestParseRefusesOtherThanObjects(t *testing.T) {
	for _, stdin := range []string{"", "null", "[]", "7", `{"name":"net"`, `{"name":"net"} {}`} {
		t.Run(stdin, func(t *testing.T) {
			got, err := Parse([]byte(stdin))
			var e *types.Error
			if !errors.As(err, &e) || e.Code != types.ErrDecodingFailure {
				t.Errorf("got %v, %v; want an error with code %d", got, err, types.ErrDecodingFailure)
			}
		})
	}
}

func wantCNIError(t *testing.T, got any, err error, code uint, msg string) {
	t.Helper()
	want := &types.Error{Code: code, Msg: msg}
	var e *types.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, %v; want %v", got, err, want)
	}
	if diff := cmp.Diff(want, e, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
}

func TestStateDir(t *testing.T) {
	for name, tc := range map[string]struct{ stdin, want string }{
		"none":                   {`{"name":"net"}`, DefaultStateDir},
		"one":                    {`{"name":"net","stateDir":"/var/run/x"}`, "/var/run/x"},
		"one among wrong keys":   {`{"name":"net","stateDir":"/var/run/x","what":1,"proxyPort":0}`, "/var/run/x"},
		"of the wrong type":      {`{"name":"net","stateDir":7}`, DefaultStateDir},
		"null":                   {`{"name":"net","stateDir":null}`, DefaultStateDir},
		"one that ADD refuses":   {`{"name":"net","stateDir":"x"}`, DefaultStateDir},
		"a text that is no JSON": {`{`, DefaultStateDir},
	} {
		t.Run(name, func(t *testing.T) {
			if got := StateDir([]byte(tc.stdin)); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

// FuzzParse looks for a text that makes Parse panic, or return what its doc comment excludes.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"net","type":"x","proxyIP":"auto","proxyPort":8181,"stateDir":"/run/x"}`))
	f.Add([]byte(`{"name":"net","prevResult":{"ips":[{"version":"4","address":"10.1.0.5/24"}]}}`))
	f.Add([]byte(`{"cni.dev/valid-attachments":null,"guard":false,"backend":"iptables"}`))
	f.Fuzz(func(t *testing.T, stdin []byte) {
		if dir := StateDir(stdin); setStateDir(&Config{}, dir) != nil {
			t.Errorf("state directory %q", dir)
		}
		c, err := Parse(stdin)
		if err != nil {
			var e *types.Error
			if !errors.As(err, &e) {
				t.Errorf("%v is not a CNI error", err)
			}
			return
		}
		if !json.Valid(stdin) || c.ProxyPort == 0 || !c.MetadataIP.Is4() || setStateDir(&Config{}, c.StateDir) != nil {
			t.Errorf("%+v of %q", c, stdin)
		}
	})
}
