package main

import (
	"bytes"
	"log/slog"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// kube2iamDefaults are all flags of kube2iam with their defaults.
var kube2iamDefaults = map[string]string{
	"api-server": "", "api-token": "", "kubeconfig": "", "insecure": "false", "app-port": "8181", "metrics-port": "8181",
	"base-role-arn": "", "auto-discover-base-arn": "false", "auto-discover-default-role": "false", "default-role": "",
	"iam-role-key": "iam.amazonaws.com/role", "iam-external-id": "iam.amazonaws.com/external-id", "iam-role-session-ttl": "15m0s",
	"iam-role-error-ttl": "0s", "namespace-restrictions": "false", "namespace-restriction-format": "glob",
	"namespace-key": "iam.amazonaws.com/allowed-roles", "cache-resync-period": "30m0s", "resolve-duplicate-cache-ips": "false",
	"backoff-max-elapsed-time": "2s", "backoff-max-interval": "1s", "host-ip": "", "host-interface": "docker0", "iptables": "false",
	"node": "", "metadata-addr": "169.254.169.254", "log-format": "text", "log-level": "info", "use-regional-sts-endpoint": "false",
	"debug": "false", "verbose": "false",
}

// ownDefaults are the defaults that differ from kube2iam's:
// docs/decisions/0009-one-table-of-keys.md.
var ownDefaults = map[string]string{"metrics-port": "8182", "iam-role-session-ttl": "1h0m0s"}

func TestFlagsOfKube2iam(t *testing.T) {
	got := map[string]string{}
	for _, c := range newFlags(new(options)) {
		c.VisitAll(func(f *pflag.Flag) {
			if _, ok := kube2iamDefaults[f.Name]; ok {
				got[f.Name] = f.DefValue
			}
		})
	}
	want := maps.Clone(kube2iamDefaults)
	maps.Copy(want, ownDefaults)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestHelpShowsEnvironmentVariables(t *testing.T) {
	var out strings.Builder
	help(&out)
	for _, c := range newFlags(new(options)) {
		c.VisitAll(func(f *pflag.Flag) {
			name := "KUBE2IAM_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
			if !strings.Contains(out.String(), "[$"+name) {
				t.Errorf("--%s: the help does not show $%s", f.Name, name)
			}
		})
	}
}

func parseWithEnv(t *testing.T, env map[string]string, args ...string) (*options, error) {
	t.Helper()
	for k, v := range env {
		t.Setenv(k, v)
	}
	return parseOptions(args)
}

func TestFlagOverridesEnvironment(t *testing.T) {
	o, err := parseWithEnv(t, map[string]string{"KUBE2IAM_BASE_ROLE_ARN": "arn:aws:iam::123456789012:role", "NODE_NAME": "from-env", "KUBE2IAM_DEFAULT_ROLE": "env"},
		"--default-role=flag", "--iptables=false", "--verbose")
	if err != nil {
		t.Fatal(err)
	}
	if o.rules.BaseARN != "arn:aws:iam::123456789012:role/" || o.node != "from-env" || o.rules.DefaultRole != "flag" || o.level != slog.LevelDebug {
		t.Errorf("%+v", o)
	}
}

func TestMetricsAddress(t *testing.T) {
	for value, want := range map[string]netip.Addr{
		"": {}, "0.0.0.0": {}, "::": {}, "127.0.0.1": netip.MustParseAddr("127.0.0.1"), "::ffff:10.0.0.1": netip.MustParseAddr("10.0.0.1"), "fd00::1": netip.MustParseAddr("fd00::1"),
	} {
		o, err := parseWithEnv(t, map[string]string{"KUBE2IAM_METRICS_ADDRESS": value})
		if err != nil || o.metricsAddress != want {
			t.Errorf("%q: %v, %v", value, o.metricsAddress, err)
		}
	}
}

func TestEnvironment(t *testing.T) {
	o, err := parseWithEnv(t, map[string]string{"KUBE2IAM_METADATA_DENY": " a,b{1,2}\n", "KUBE2IAM_VERBOSE": "true", "KUBE2IAM_IPTABLES": "", "KUBE2IAM_IAM_ROLE_SESSION_TTL": "2h",
		"KUBE2IAM_NODE": "first", "NODE_NAME": "second"})
	if err != nil || len(o.metadataDeny) != 1 || o.metadataDeny[0].String() != "a,b{1,2}" || o.level != slog.LevelDebug || o.iptables || o.rules.Duration != 2*time.Hour || o.node != "first" {
		t.Errorf("%+v, %v", o, err)
	}
	if _, err := parseWithEnv(t, map[string]string{"KUBE2IAM_IAM_ROLE_SESSION_TTL": "long"}); err == nil || !strings.Contains(err.Error(), "KUBE2IAM_IAM_ROLE_SESSION_TTL") {
		t.Errorf("%v", err)
	}
}

func TestSessionAndMetadataFlags(t *testing.T) {
	o, err := parseWithEnv(t, map[string]string{"NODE_NAME": "node-1"}, "--session-tags", "--cluster-name", "prod", "--session-scope", "role",
		"--assume-role-arn", "arn:aws:iam::123456789012:role/between", "--use-fips-sts-endpoint", "--imds-v2", "required",
		"--metadata-deny", "^/a{1,2}", "--metadata-deny", "user-data", "--namespace-restrictions")
	if err != nil {
		t.Fatal(err)
	}
	r := o.rules
	if *r.Tags != (roles.Tags{ClusterName: "prod"}) || r.Scope != roles.RoleScope || r.SourceIdentity || r.Node != "node-1" ||
		r.SessionNameKey != "iam.amazonaws.com/session-name" || r.SessionPolicyKey != "iam.amazonaws.com/session-policy" {
		t.Errorf("%+v", r)
	}
	if o.throughRole != "arn:aws:iam::123456789012:role/between" || !o.fipsSTS || o.imdsV2 != "required" || len(o.metadataDeny) != 2 || o.metadataDeny[0].String() != "^/a{1,2}" {
		t.Errorf("%+v", o)
	}
}

func TestSourceIdentityFlag(t *testing.T) {
	o, err := parseWithEnv(t, nil, "--source-identity")
	if err != nil || !o.rules.SourceIdentity {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestInvalidFlags(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"--app-port 0", `--app-port: 0`},
		{"--app-port http", `"http" for "--app-port"`},
		{"--metrics-port 70000", `"70000" for "--metrics-port"`},
		{"--metrics-port 8181", `--metrics-port: 8181`},
		{"--metrics-address localhost", `"localhost" for "--metrics-address"`},
		{"--metrics-address 127.0.0.1:8182", `"127.0.0.1:8182" for "--metrics-address"`},
		{"--metrics-address fe80::1%eth0", `--metrics-address: fe80::1%eth0`},
		{"--metrics-address ff02::1", `--metrics-address: ff02::1`},
		{"--base-role-arn role", `--base-role-arn: "role/"`},
		{"--default-role reader", `--default-role: "reader"`},
		{"--iam-role-session-ttl 1m", `--iam-role-session-ttl: 1m0s`},
		{"--iam-role-session-ttl 13h", `--iam-role-session-ttl: 13h0m0s`},
		{"--iam-role-error-ttl -1s", `--iam-role-error-ttl: -1s`},
		{"--namespace-restriction-format sed", `--namespace-restriction-format: "sed"`},
		{"--host-ip here", `"here" for "--host-ip"`},
		{"--iptables", `--iptables: it also requires --host-ip`},
		{"--log-level loud", `--log-level: slog: level string "loud"`},
		{"--log-format xml", `--log-format: "xml"`},
		{"--iam-role-key=", `--iam-role-key`},
		{"--metadata-deny=", `--metadata-deny`},
		{"--metadata-deny (", `--metadata-deny: error parsing regexp`},
		{"--imds-v2 never", `--imds-v2: "never"`},
		{"--pod-requests-per-second -1", `--pod-requests-per-second: -1`},
		{"--pod-requests-per-second NaN", `--pod-requests-per-second: NaN`},
		{"--pod-requests-per-second many", `"many" for "--pod-requests-per-second"`},
		{"--session-scope node", `--session-scope: "node"`},
		{"--cluster-name prod", `--cluster-name: it is for --session-tags`},
		{"--session-tags --cluster-arn a*b", `--cluster-arn: "a*b"`},
		{"--assume-role-arn reader", `--assume-role-arn: "reader"`},
		{"--iam-session-policy=", `--iam-session-policy`},
		{"--source-identity --session-scope role", `--source-identity: it names one pod`},
		{"serve", `unexpected argument "serve"`},
	} {
		t.Run(tt.args, func(t *testing.T) {
			if _, err := parseOptions(strings.Fields(tt.args)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %s", err, tt.want)
			}
		})
	}
}

func TestExitCodes(t *testing.T) {
	for _, arg := range []string{"--help", "-h", "--version", "-v", "ready --help", "live -h"} {
		var out, errs bytes.Buffer
		if code := run(append([]string{"kube2iam-proxy"}, strings.Fields(arg)...), &out, &errs); code != 0 || out.Len() == 0 || errs.Len() != 0 {
			t.Errorf("%s: %d %q %q", arg, code, &out, &errs)
		}
	}
	for _, wrong := range []string{"ready --nope", "ready now", "live --nope"} {
		var out, errs bytes.Buffer
		if code := run(append([]string{"kube2iam-proxy"}, strings.Fields(wrong)...), &out, &errs); code != exitUsage {
			t.Errorf("%s: %d", wrong, code)
		}
	}
	var out, errs bytes.Buffer
	if code := run([]string{"kube2iam-proxy", "--nope"}, &out, &errs); code != exitUsage || !strings.Contains(errs.String(), "nope") {
		t.Errorf("%d %q", code, &errs)
	}
}
