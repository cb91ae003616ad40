package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// options is the configuration after flags and environment are read and checked.
type options struct {
	apiServer, apiToken, kubeconfig string
	insecure                        bool

	appPort, metricsPort uint16
	metricsAddress       netip.Addr // invalid for every address of the node
	node, stateDir       string

	rules                roles.Rules
	discoverBaseARN      bool
	discoverDefaultRole  bool
	errorTTL             time.Duration
	resync               time.Duration
	maxElapsed           time.Duration
	maxInterval          time.Duration
	resolveDuplicates    bool
	metadataAddr         string
	metadataIP           netip.Addr // that of metadataAddr, where it is one
	metadataDeny         []*regexp.Regexp
	requireTokens        bool
	podRequests          float64 // in a second; 0 for no bound
	stsEndpoint          string
	regionalSTS, fipsSTS bool
	throughRole          string
	iptables             bool
	hostIP               netip.Addr
	hostInterface        string
	logFormat, logLevel  string
	debug                bool
}

const (
	catKubernetes = "Kubernetes"
	catRoles      = "Roles and credentials"
	catMetadata   = "Metadata service"
	catNode       = "Redirection (only for nodes whose CNI cannot be chained)"
	catProcess    = "Process"
)

func flags() *flagSet {
	f := newFlagSet()
	f.str(catKubernetes, "api-server", "", "endpoint of the API server; in a pod it is found by itself")
	f.str(catKubernetes, "api-token", "", "token to authenticate with the API server")
	f.str(catKubernetes, "kubeconfig", "", "kubeconfig `FILE`, in place of the pod's service account")
	f.boolean(catKubernetes, "insecure", "do not verify the API server's certificate; for tests only")
	f.str(catKubernetes, "node", "", "name of this node (default: the host name)", "NODE_NAME")
	f.duration(catKubernetes, "cache-resync-period", 30*time.Minute, "how often every known pod is looked at again without a change")
	f.boolean(catKubernetes, "resolve-duplicate-cache-ips", "ask the API server which pod it is when several seem to have an address")
	f.duration(catKubernetes, "backoff-max-elapsed-time", 2*time.Second, "how long a request waits for its pod to become known")
	f.duration(catKubernetes, "backoff-max-interval", time.Second, "the longest pause between two looks for such a pod")

	f.str(catRoles, "base-role-arn", "", "prefix that completes the role names of annotations, as arn:aws:iam::123456789012:role/")
	f.boolean(catRoles, "auto-discover-base-arn", "take the prefix from the node's instance profile")
	f.str(catRoles, "default-role", "", "role, name or ARN, of pods without the annotation")
	f.boolean(catRoles, "auto-discover-default-role", "take the node's own role as the default role")
	f.str(catRoles, "iam-role-key", "iam.amazonaws.com/role", "pod annotation that names the role")
	f.str(catRoles, "iam-external-id", "iam.amazonaws.com/external-id", "pod annotation that holds the external ID")
	f.str(catRoles, "iam-session-name", "iam.amazonaws.com/session-name", "pod annotation that holds the session's name (default: NAMESPACE.POD)")
	f.str(catRoles, "iam-session-policy", "iam.amazonaws.com/session-policy", "pod annotation that holds a policy, in JSON, that the session may do no more than")
	f.str(catRoles, "session-scope", "pod", "pod: each has a session of its own; role: the pods of a node that have a role share one")
	f.boolean(catRoles, "session-tags", "tag sessions with namespace, service account and pod, by the keys of EKS Pod Identity; needs sts:TagSession")
	f.str(catRoles, "cluster-name", "", "name of this cluster, for the session tags")
	f.str(catRoles, "cluster-arn", "", "ARN of this cluster, for the session tags")
	f.boolean(catRoles, "source-identity", "set the sessions' source identity to NAMESPACE.POD, whatever their name; needs sts:SetSourceIdentity and --session-scope=pod")
	f.str(catRoles, "assume-role-arn", "", "`ARN` of a role to assume first, which then assumes the pods' roles; sessions last an hour at most then")
	f.duration(catRoles, "iam-role-session-ttl", time.Hour, "length of a role session; kube2iam's 15m is too short for several SDKs")
	f.duration(catRoles, "iam-role-error-ttl", 0, "how long an error of STS is remembered; 0 chooses by its kind")
	f.boolean(catRoles, "namespace-restrictions", "pods get only roles that an annotation of their namespace allows")
	f.str(catRoles, "namespace-restriction-format", "glob", "how the namespaces' patterns are written: glob or regexp")
	f.str(catRoles, "namespace-key", "iam.amazonaws.com/allowed-roles", "namespace annotation with a JSON array of patterns; kiam's "+roles.PermittedKey+" is read too")
	f.boolean(catRoles, "use-regional-sts-endpoint", "ask the STS endpoint of the node's region rather than the global one")
	f.boolean(catRoles, "use-fips-sts-endpoint", "ask the FIPS endpoint of STS of the node's region")
	f.str(catRoles, "sts-endpoint", "", "`URL` of STS, for a VPC endpoint or a test")

	f.str(catMetadata, "metadata-addr", "169.254.169.254", "address of the EC2 metadata service")
	f.list(catMetadata, "metadata-deny", "`REGEXP` that paths which pods must not see match anywhere, as ^/[^/]+/user-data; repeatable. The node's own credentials they never do")
	f.str(catMetadata, "imds-v2", "optional", "optional, or required: requests without a session token are refused")
	f.str(catMetadata, "pod-requests-per-second", "200", "requests of one pod that are answered in a second, after 1000 at once; one too many waits. 0 for no bound")
	f.str(catMetadata, "app-port", "8181", "port that the pods' metadata requests are redirected to")
	f.str(catMetadata, "metrics-port", "8182", "port of /healthz and /metrics; never the app port, which serves pods only")
	f.str(catMetadata, "metrics-address", "", "`IP` address of the node that the metrics port is bound to (default: every address of the node)")
	f.str(catMetadata, "state-dir", defaultStateDir, "where the plugin keeps its records: `DIR`, as in its stateDir")

	f.boolean(catNode, "iptables", "add one rule for the whole node (also requires --host-ip); needless where the plugin is chained")
	f.str(catNode, "host-ip", "", "address of this node, for that rule", "HOST_IP")
	f.str(catNode, "host-interface", "docker0", "interface that pods come by, for that rule")

	f.str(catProcess, "log-format", "text", "text or json")
	f.str(catProcess, "log-level", "info", "debug, info, warn or error")
	f.boolean(catProcess, "verbose", "the same as --log-level debug")
	f.boolean(catProcess, "debug", "serve /debug/store, which pod has which role, on the metrics port of the loopback")
	return f
}

// AssumeRole's own bounds on a session.
const (
	minSession = 15 * time.Minute
	maxSession = 12 * time.Hour
)

const maxPodRequests = 1_000_000

// parse checks every value; the error names each flag that is wrong.
func parse(c *flagSet) (*options, error) {
	var errs []error
	bad := func(flag string, err error) {
		errs = append(errs, fmt.Errorf("--%s: %w", flag, err))
	}
	port := func(flag string) uint16 {
		n, err := strconv.ParseUint(c.text(flag), 10, 16)
		if err != nil || n == 0 {
			bad(flag, fmt.Errorf("%q is not a port (1 to 65535)", c.text(flag)))
		}
		return uint16(n)
	}
	span := func(flag string, least, most time.Duration) time.Duration {
		d := c.span(flag)
		if d < least || d > most {
			bad(flag, fmt.Errorf("%s is not within %s and %s", d, least, most))
		}
		return d
	}
	word := func(flag string, known ...string) string {
		for _, k := range known {
			if strings.EqualFold(c.text(flag), k) {
				return k
			}
		}
		bad(flag, fmt.Errorf("%q is none of %s", c.text(flag), strings.Join(known, ", ")))
		return known[0]
	}
	if c.NArg() > 0 {
		errs = append(errs, fmt.Errorf("unexpected argument %q", c.Arg(0)))
	}
	o := &options{
		apiServer: c.text("api-server"), apiToken: c.text("api-token"), kubeconfig: c.text("kubeconfig"), insecure: c.is("insecure"),
		appPort: port("app-port"), metricsPort: port("metrics-port"),
		node: c.text("node"), stateDir: c.text("state-dir"),
		rules: roles.Rules{
			RoleKey: c.text("iam-role-key"), ExternalIDKey: c.text("iam-external-id"),
			SessionNameKey: c.text("iam-session-name"), SessionPolicyKey: c.text("iam-session-policy"), SourceIdentity: c.is("source-identity"),
			DefaultRole: c.text("default-role"), Duration: span("iam-role-session-ttl", minSession, maxSession),
		},
		discoverBaseARN: c.is("auto-discover-base-arn"), discoverDefaultRole: c.is("auto-discover-default-role"),
		errorTTL: span("iam-role-error-ttl", 0, time.Hour), resync: span("cache-resync-period", 0, 24*time.Hour),
		maxElapsed: span("backoff-max-elapsed-time", 0, time.Minute), maxInterval: span("backoff-max-interval", 0, time.Minute),
		resolveDuplicates: c.is("resolve-duplicate-cache-ips"),
		metadataAddr:      c.text("metadata-addr"), stsEndpoint: c.text("sts-endpoint"), regionalSTS: c.is("use-regional-sts-endpoint"), fipsSTS: c.is("use-fips-sts-endpoint"), throughRole: c.text("assume-role-arn"),
		iptables: c.is("iptables"), hostInterface: c.text("host-interface"),
		logFormat: word("log-format", "text", "json"), logLevel: word("log-level", "debug", "info", "warn", "error"), debug: c.is("debug"),
	}
	if c.is("verbose") {
		o.logLevel = "debug"
	}
	if o.appPort == o.metricsPort && o.appPort != 0 {
		bad("metrics-port", fmt.Errorf("%d is the app port too: that one serves redirected connections and nothing else", o.metricsPort))
	}
	if s := c.text("metrics-address"); s != "" {
		ip, err := netip.ParseAddr(s)
		switch {
		case err != nil || ip.Zone() != "":
			bad("metrics-address", fmt.Errorf("%q is not an IP address without a zone", s))
		case ip.IsMulticast():
			bad("metrics-address", fmt.Errorf("%q is a multicast address", s))
		case !ip.IsUnspecified():
			o.metricsAddress = ip.Unmap()
		}
	}
	if base := c.text("base-role-arn"); base != "" {
		arn, err := roles.ParseBaseARN(base)
		if err != nil {
			bad("base-role-arn", err)
		}
		o.rules.BaseARN = arn
	}
	if err := o.rules.Validate(); err != nil && !o.discoverBaseARN {
		bad("default-role", err)
	}
	if c.is("namespace-restrictions") {
		format := word("namespace-restriction-format", string(roles.Glob), string(roles.Regexp))
		o.rules.Restriction = &roles.Restriction{Key: c.text("namespace-key"), Format: roles.Format(format)}
	}
	o.rules.Scope = roles.Scope(word("session-scope", string(roles.PodScope), string(roles.RoleScope)))
	if o.rules.SourceIdentity && o.rules.Scope == roles.RoleScope {
		bad("source-identity", errors.New("it names one pod, and a session of --session-scope=role serves several"))
	}
	for _, name := range []string{"cluster-name", "cluster-arn"} {
		if err := roles.ValidateTagValue(c.text(name)); err != nil {
			bad(name, err)
		}
		if c.text(name) != "" && !c.is("session-tags") {
			bad(name, errors.New("it is for --session-tags, which is not set"))
		}
	}
	if c.is("session-tags") {
		o.rules.Tags = &roles.Tags{ClusterName: c.text("cluster-name"), ClusterARN: c.text("cluster-arn")}
	}
	if o.throughRole != "" {
		if err := roles.ValidateARN(o.throughRole); err != nil {
			bad("assume-role-arn", err)
		}
	}
	for _, key := range []string{"iam-role-key", "iam-external-id", "iam-session-name", "iam-session-policy", "namespace-key"} {
		if c.text(key) == "" {
			bad(key, errors.New("an annotation's key cannot be empty"))
		}
	}
	if ip, err := netip.ParseAddr(o.metadataAddr); err == nil {
		o.metadataIP = ip.Unmap()
	}
	o.requireTokens = word("imds-v2", "optional", "required") == "required"
	var err error
	if o.podRequests, err = strconv.ParseFloat(c.text("pod-requests-per-second"), 64); err != nil || !(o.podRequests >= 0 && o.podRequests <= maxPodRequests) {
		bad("pod-requests-per-second", fmt.Errorf("%q is not a number within 0 and %d", c.text("pod-requests-per-second"), maxPodRequests))
	}
	for _, s := range c.all("metadata-deny") {
		s = strings.TrimSpace(s) // a file's last newline would have it match nothing
		deny, err := regexp.Compile(s)
		if err == nil && s == "" {
			err = errors.New("an empty one denies everything")
		}
		if err != nil {
			bad("metadata-deny", err)
			continue
		}
		o.metadataDeny = append(o.metadataDeny, deny)
	}
	if s := c.text("host-ip"); s != "" {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			bad("host-ip", fmt.Errorf("%q is not an IP address", s))
		}
		o.hostIP = ip
	}
	if o.iptables && !o.hostIP.IsValid() {
		bad("iptables", errors.New("it also requires --host-ip"))
	}
	if o.node == "" {
		name, err := os.Hostname()
		if err != nil {
			bad("node", fmt.Errorf("not given, and the host name is not known: %w", err))
		}
		o.node = strings.ToLower(name)
	}
	o.rules.Node = o.node
	return o, errors.Join(errs...)
}

// defaultStateDir is the plugin's (netconf.DefaultStateDir), which this program does not link.
const defaultStateDir = "/run/kube2iam-cni"
