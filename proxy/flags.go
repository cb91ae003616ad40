package main

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// category is a section of the help.
//
// The flags are pflag's, as kube2iam's are. urfave/cli, which the agent uses, formats its help with
// text/template. The linker then keeps every method of every type: 4 MB of this program.
type category struct {
	title string
	*pflag.FlagSet
}

func newCategory(title string) category {
	c := category{title, pflag.NewFlagSet(title, pflag.ContinueOnError)}
	c.SortFlags = false
	return c
}

// defaultStateDir is the plugin's (netconf.DefaultStateDir), which this program does not link.
const defaultStateDir = "/run/kube2iam-cni"

const stateDirUsage = "`DIR` of the plugin's records, as its stateDir"

// newFlags returns all flags, by category. Parsing a flag sets its field of o.
func newFlags(o *options) []category {
	o.rules.Tags, o.rules.Restriction = new(roles.Tags), new(roles.Restriction)

	kubernetes := newCategory("Kubernetes")
	kubernetes.StringVar(&o.apiServer, "api-server", "", "endpoint of the API server (default: that of the pod's service account)")
	kubernetes.StringVar(&o.apiToken, "api-token", "", "token to authenticate with the API server")
	kubernetes.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig `FILE`, in place of the pod's service account")
	kubernetes.BoolVar(&o.insecure, "insecure", false, "do not verify the API server's certificate; for tests only")
	kubernetes.StringVar(&o.node, "node", "", "name of this node (default: the host name)")
	kubernetes.DurationVar(&o.resync, "cache-resync-period", 30*time.Minute, "time between two checks of every known pod without a change")
	kubernetes.BoolVar(&o.resolveDuplicates, "resolve-duplicate-cache-ips", false, "ask the API server which pod has an address that several pods report")
	kubernetes.DurationVar(&o.maxElapsed, "backoff-max-elapsed-time", 2*time.Second, "how long a request waits for its pod to become known")
	kubernetes.DurationVar(&o.maxInterval, "backoff-max-interval", time.Second, "longest pause between two attempts to find such a pod")

	sts := newCategory("Roles and credentials")
	sts.StringVar(&o.rules.BaseARN, "base-role-arn", "", "prefix that completes the role names of annotations, such as arn:aws:iam::123456789012:role/")
	sts.BoolVar(&o.discoverBaseARN, "auto-discover-base-arn", false, "take the prefix from the node's instance profile")
	sts.StringVar(&o.rules.DefaultRole, "default-role", "", "role, name or ARN, of pods without the annotation")
	sts.BoolVar(&o.discoverDefaultRole, "auto-discover-default-role", false, "take the node's own role as the default role")
	sts.StringVar(&o.rules.RoleKey, "iam-role-key", "iam.amazonaws.com/role", "pod annotation that names the role")
	sts.StringVar(&o.rules.ExternalIDKey, "iam-external-id", "iam.amazonaws.com/external-id", "pod annotation that holds the external ID")
	sts.StringVar(&o.rules.SessionNameKey, "iam-session-name", "iam.amazonaws.com/session-name", "pod annotation that holds the session's name (default: NAMESPACE.POD)")
	sts.StringVar(&o.rules.SessionPolicyKey, "iam-session-policy", "iam.amazonaws.com/session-policy", "pod annotation that holds a JSON policy, which limits the session")
	sts.StringVar((*string)(&o.rules.Scope), "session-scope", string(roles.PodScope), "pod: each has a session of its own; role: the pods of a node that have a role share one")
	sts.BoolVar(&o.sessionTags, "session-tags", false, "tag sessions with namespace, service account and pod, by the keys of EKS Pod Identity; needs sts:TagSession")
	sts.StringVar(&o.rules.Tags.ClusterName, "cluster-name", "", "name of this cluster, for the session tags")
	sts.StringVar(&o.rules.Tags.ClusterARN, "cluster-arn", "", "ARN of this cluster, for the session tags")
	sts.BoolVar(&o.rules.SourceIdentity, "source-identity", false, "set the sessions' source identity to NAMESPACE.POD, whatever their name; needs sts:SetSourceIdentity and --session-scope=pod")
	sts.StringVar(&o.throughRole, "assume-role-arn", "", "`ARN` of a role to assume first, which then assumes the pods' roles; sessions last an hour at most then")
	sts.DurationVar(&o.rules.Duration, "iam-role-session-ttl", time.Hour, "length of a role session; kube2iam's 15m is too short for several SDKs")
	sts.DurationVar(&o.errorTTL, "iam-role-error-ttl", 0, "how long an error of STS is remembered; 0 chooses by its kind")
	sts.BoolVar(&o.restrict, "namespace-restrictions", false, "pods get only roles that an annotation of their namespace allows")
	sts.StringVar((*string)(&o.rules.Restriction.Format), "namespace-restriction-format", string(roles.Glob), "how the namespaces' patterns are written: glob or regexp")
	sts.StringVar(&o.rules.Restriction.Key, "namespace-key", "iam.amazonaws.com/allowed-roles", "namespace annotation with a JSON array of patterns; kiam's "+roles.PermittedKey+" is read too")
	sts.BoolVar(&o.regionalSTS, "use-regional-sts-endpoint", false, "ask the STS endpoint of the node's region rather than the global one")
	sts.BoolVar(&o.fipsSTS, "use-fips-sts-endpoint", false, "ask the FIPS endpoint of STS of the node's region")
	sts.StringVar(&o.stsEndpoint, "sts-endpoint", "", "`URL` of STS, for a VPC endpoint or a test")

	imds := newCategory("Metadata service")
	imds.StringVar(&o.metadataAddr, "metadata-addr", "169.254.169.254", "address of the EC2 metadata service")
	imds.StringArrayVar(&o.denyPatterns, "metadata-deny", nil, "`REGEXP` of paths that pods must not request, matched anywhere in the path, such as ^/[^/]+/user-data; repeatable. Paths to the node's own credentials are always refused")
	imds.StringVar(&o.imdsV2, "imds-v2", "optional", "optional, or required: requests without a session token are refused")
	imds.Float64Var(&o.podRequests, "pod-requests-per-second", 200, "requests of one pod that are answered in a second, after a burst of 1000; more wait. 0 for no limit")
	imds.Uint16Var(&o.appPort, "app-port", 8181, "`PORT` that the pods' metadata requests are redirected to")
	imds.Uint16Var(&o.metricsPort, "metrics-port", 8182, "`PORT` of /healthz and /metrics; never the app port, which serves pods only")
	imds.TextVar(&o.metricsAddress, "metrics-address", netip.Addr{}, "`IP` address of the node that the metrics port is bound to (default: every address of the node)")
	imds.StringVar(&o.stateDir, "state-dir", defaultStateDir, stateDirUsage)

	redirection := newCategory("Redirection (only for nodes whose CNI cannot be chained)")
	redirection.BoolVar(&o.iptables, "iptables", false, "add one rule for the whole node, which also requires --host-ip; needless where the plugin is chained")
	redirection.TextVar(&o.hostIP, "host-ip", netip.Addr{}, "`IP` address of this node, for that rule")
	redirection.StringVar(&o.hostInterface, "host-interface", "docker0", "interface by which the pods' packets arrive, for that rule")

	process := newCategory("Process")
	process.StringVar(&o.logFormat, "log-format", "text", "text or json")
	process.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	process.BoolVar(&o.verbose, "verbose", false, "same as --log-level debug")
	process.BoolVar(&o.debug, "debug", false, "serve /debug/store, which shows the role of each pod, on the metrics port, to the loopback only")
	return []category{kubernetes, sts, imds, redirection, process}
}

// envVars returns the environment variables of a flag. The first one that is set wins.
func envVars(flag string) []string {
	names := []string{"KUBE2IAM_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))}
	switch flag {
	case "node":
		names = append(names, "NODE_NAME")
	case "host-ip":
		names = append(names, "HOST_IP")
	}
	return names
}

// parseFlags parses the command line, and then the environment for the flags that it does not
// contain. An empty environment variable counts as unset. The error is pflag.ErrHelp if the command
// line asks for help.
func parseFlags(args []string, categories ...category) error {
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	all.Usage = func() {}
	for _, c := range categories {
		all.AddFlagSet(c.FlagSet)
	}
	if err := all.Parse(args); err != nil {
		return err
	}
	if all.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", all.Arg(0))
	}
	var err error
	all.VisitAll(func(f *pflag.Flag) {
		for _, name := range envVars(f.Name) {
			value := os.Getenv(name)
			if err != nil || f.Changed || value == "" {
				continue
			}
			if err = all.Set(f.Name, value); err != nil {
				err = fmt.Errorf("$%s: %w", name, err)
			}
		}
	})
	return err
}

// usages returns the help of the category's flags.
func (c category) usages() string {
	c.VisitAll(func(f *pflag.Flag) { f.Usage += " [$" + strings.Join(envVars(f.Name), ", $") + "]" })
	return c.FlagUsages()
}
