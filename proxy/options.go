package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// options is the configuration. The flags set most fields; validate derives the others.
type options struct {
	apiServer, apiToken, kubeconfig string
	insecure                        bool
	node                            string
	resync                          time.Duration
	resolveDuplicates               bool
	maxElapsed, maxInterval         time.Duration

	rules                                roles.Rules
	discoverBaseARN, discoverDefaultRole bool
	sessionTags                          bool // whether rules has tags
	throughRole                          string
	errorTTL                             time.Duration
	restrict                             bool // whether rules has a restriction
	regionalSTS, fipsSTS                 bool
	stsEndpoint                          string

	metadataAddr         string
	metadataIP           netip.Addr // metadataAddr if that is an IP address
	denyPatterns         []string
	metadataDeny         []*regexp.Regexp // from denyPatterns
	imdsV2               string
	podRequests          float64 // per second; 0 for no bound
	appPort, metricsPort uint16
	metricsAddress       netip.Addr // invalid for every address of the node
	stateDir             string

	iptables      bool
	hostIP        netip.Addr
	hostInterface string

	logFormat, logLevel string
	level               slog.Level // from logLevel and verbose
	verbose, debug      bool
}

const (
	// minSession and maxSession are the bounds of AssumeRole.
	minSession, maxSession = 15 * time.Minute, 12 * time.Hour
	maxPodRequests         = 1_000_000
)

// parseOptions parses and checks the command line and the environment.
func parseOptions(args []string) (*options, error) {
	o := new(options)
	if err := parseFlags(args, newFlags(o)...); err != nil {
		return nil, err
	}
	return o, o.validate()
}

// validate checks the options, and sets those that follow from others. The error names each flag
// that is wrong.
func (o *options) validate() error {
	var errs []error
	check := func(flag string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", flag, err))
		}
	}
	require := func(condition bool, flag, format string, args ...any) {
		if !condition {
			check(flag, fmt.Errorf(format, args...))
		}
	}
	within := func(flag string, d, least, most time.Duration) {
		require(least <= d && d <= most, flag, "%s is not within %s and %s", d, least, most)
	}
	oneOf := func(flag, word string, words ...string) {
		require(slices.Contains(words, word), flag, "%q is none of %s", word, strings.Join(words, ", "))
	}
	var err error

	within("cache-resync-period", o.resync, 0, 24*time.Hour)
	within("backoff-max-elapsed-time", o.maxElapsed, 0, time.Minute)
	within("backoff-max-interval", o.maxInterval, 0, time.Minute)
	if o.node == "" {
		name, err := os.Hostname()
		check("node", err)
		o.node = strings.ToLower(name)
	}

	o.rules.Node = o.node
	if o.rules.BaseARN != "" {
		o.rules.BaseARN, err = roles.ParseBaseARN(o.rules.BaseARN)
		check("base-role-arn", err)
	}
	if !o.discoverBaseARN {
		check("default-role", o.rules.Validate())
	}
	for flag, key := range map[string]string{
		"iam-role-key": o.rules.RoleKey, "iam-external-id": o.rules.ExternalIDKey, "iam-session-name": o.rules.SessionNameKey,
		"iam-session-policy": o.rules.SessionPolicyKey, "namespace-key": o.rules.Restriction.Key,
	} {
		require(key != "", flag, "an annotation's key cannot be empty")
	}
	oneOf("session-scope", string(o.rules.Scope), string(roles.PodScope), string(roles.RoleScope))
	require(!o.rules.SourceIdentity || o.rules.Scope != roles.RoleScope, "source-identity",
		"it names one pod, and a session of --session-scope=role serves several")
	for flag, tag := range map[string]string{"cluster-name": o.rules.Tags.ClusterName, "cluster-arn": o.rules.Tags.ClusterARN} {
		check(flag, roles.ValidateTagValue(tag))
		require(tag == "" || o.sessionTags, flag, "it is for --session-tags, which is not set")
	}
	if !o.sessionTags {
		o.rules.Tags = nil
	}
	if o.throughRole != "" {
		check("assume-role-arn", roles.ValidateARN(o.throughRole))
	}
	within("iam-role-session-ttl", o.rules.Duration, minSession, maxSession)
	within("iam-role-error-ttl", o.errorTTL, 0, time.Hour)
	oneOf("namespace-restriction-format", string(o.rules.Restriction.Format), string(roles.Glob), string(roles.Regexp))
	if !o.restrict {
		o.rules.Restriction = nil
	}

	if ip, err := netip.ParseAddr(o.metadataAddr); err == nil {
		o.metadataIP = ip.Unmap()
	}
	for _, pattern := range o.denyPatterns {
		pattern = strings.TrimSpace(pattern) // with the newline at a file's end, it would match nothing
		require(pattern != "", "metadata-deny", "an empty expression denies everything")
		deny, err := regexp.Compile(pattern)
		check("metadata-deny", err)
		o.metadataDeny = append(o.metadataDeny, deny)
	}
	oneOf("imds-v2", o.imdsV2, "optional", "required")
	require(o.podRequests >= 0 && o.podRequests <= maxPodRequests, "pod-requests-per-second", "%v is not within 0 and %d", o.podRequests, maxPodRequests)
	require(o.appPort != 0, "app-port", "0 is not a port")
	require(o.metricsPort != 0, "metrics-port", "0 is not a port")
	require(o.appPort != o.metricsPort, "metrics-port", "%d is the app port, which serves redirected connections only", o.metricsPort)
	require(o.metricsAddress.Zone() == "" && !o.metricsAddress.IsMulticast(), "metrics-address", "%s has a zone or is a multicast address", o.metricsAddress)
	o.metricsAddress = o.metricsAddress.Unmap()
	if o.metricsAddress.IsUnspecified() {
		o.metricsAddress = netip.Addr{}
	}
	require(!o.iptables || o.hostIP.IsValid(), "iptables", "it also requires --host-ip")

	o.logFormat = strings.ToLower(o.logFormat)
	oneOf("log-format", o.logFormat, "text", "json")
	check("log-level", o.level.UnmarshalText([]byte(o.logLevel)))
	if o.verbose {
		o.level = slog.LevelDebug
	}
	return errors.Join(errs...)
}
