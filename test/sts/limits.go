package sts

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// roleInput has the parameters of AssumeRole.
type roleInput struct {
	roleARN, sessionName, externalID, sourceIdentity, policy string
	duration                                                 time.Duration
	tags                                                     map[string]string
}

// Limits of the API reference's AssumeRole, "Request Parameters".
var (
	wordPattern       = regexp.MustCompile(`^[\w+=,.@-]*$`)
	externalIDPattern = regexp.MustCompile(`^[\w+=,.@:\/-]*$`)
	roleARNPattern    = regexp.MustCompile(`^arn:[\w-]+:iam::\d{12}:role/[\w+=,.@/-]+$`)
	tagPattern        = regexp.MustCompile(`^[\p{L}\p{Z}\p{N}_.:/=+\-@]*$`)
)

const (
	maxPolicy = 2048
	maxTags   = 50
	// maxPacked is the limit on the packed size of policy and tags, in percent.
	maxPacked = 100
)

// assumeRoleInput reads and validates the parameters. With an error it returns the parameters that
// it could read.
func assumeRoleInput(params url.Values) (roleInput, *apiError) {
	in := roleInput{
		roleARN:        params.Get("RoleArn"),
		sessionName:    params.Get("RoleSessionName"),
		externalID:     params.Get("ExternalId"),
		sourceIdentity: params.Get("SourceIdentity"),
		policy:         params.Get("Policy"),
		duration:       time.Hour,
	}
	var broken violations
	broken.text(params, "RoleArn", true, 20, 2048, nil)
	broken.text(params, "RoleSessionName", true, 2, 64, wordPattern)
	broken.text(params, "ExternalId", false, 2, 1224, externalIDPattern)
	broken.text(params, "SourceIdentity", false, 2, 64, wordPattern)
	broken.text(params, "Policy", false, 1, maxPolicy, nil)
	if raw, given := params["DurationSeconds"]; given {
		seconds, err := strconv.Atoi(raw[0])
		if err != nil {
			return in, refuse(http.StatusBadRequest, "MalformedInput", "DurationSeconds: %q is no number", raw[0])
		}
		in.duration = time.Duration(seconds) * time.Second
		if seconds < 900 {
			broken.add("DurationSeconds", raw[0], "Member must have value greater than or equal to 900")
		}
		if seconds > 43200 {
			broken.add("DurationSeconds", raw[0], "Member must have value less than or equal to 43200")
		}
	}
	tags, twice := broken.tags(params)
	in.tags = tags
	switch {
	case len(broken) > 0:
		return in, broken.err()
	case twice != "":
		return in, refuse(http.StatusBadRequest, "InvalidParameterValue", "Duplicate tag keys found: %s. Please note that Tag keys are case insensitive.", twice)
	case !roleARNPattern.MatchString(in.roleARN):
		return in, validation(in.roleARN + " is invalid")
	}
	if in.policy != "" && !isPolicy(in.policy) {
		return in, refuse(http.StatusBadRequest, "MalformedPolicyDocument", "Syntax errors in policy.")
	}
	if packed := in.packedPercent(); packed > maxPacked {
		return in, refuse(http.StatusBadRequest, "PackedPolicyTooLarge",
			"Packed size of session tags consumes %d%% of allotted space.", packed)
	}
	return in, nil
}

// isPolicy reports whether the text looks like a policy: an object with statements that have an
// effect.
func isPolicy(text string) bool {
	var policy struct{ Statement json.RawMessage }
	if json.Unmarshal([]byte(text), &policy) != nil || policy.Statement == nil {
		return false
	}
	type statement struct{ Effect string }
	var many []statement
	if json.Unmarshal(policy.Statement, &many) != nil {
		many = make([]statement, 1)
		if json.Unmarshal(policy.Statement, &many[0]) != nil {
			return false
		}
	}
	for _, s := range many {
		if s.Effect != "Allow" && s.Effect != "Deny" {
			return false
		}
	}
	return len(many) > 0
}

// violations are the constraints that a request violates, in AWS's words.
type violations []string

func (v *violations) add(name, value, constraint string) {
	member := strings.ToLower(name[:1]) + name[1:]
	*v = append(*v, fmt.Sprintf("Value '%s' at '%s' failed to satisfy constraint: %s", value, member, constraint))
}

func (v *violations) text(params url.Values, name string, required bool, least, most int, pattern *regexp.Regexp) {
	if _, given := params[name]; !given {
		if required {
			member := strings.ToLower(name[:1]) + name[1:]
			*v = append(*v, fmt.Sprintf("Value null at '%s' failed to satisfy constraint: Member must not be null", member))
		}
		return
	}
	value := params.Get(name)
	n := utf8.RuneCountInString(value)
	if n < least {
		v.add(name, value, fmt.Sprintf("Member must have length greater than or equal to %d", least))
	}
	if n > most {
		v.add(name, value, fmt.Sprintf("Member must have length less than or equal to %d", most))
	}
	if pattern != nil && !pattern.MatchString(value) {
		v.add(name, value, "Member must satisfy regular expression pattern: "+strings.Trim(pattern.String(), "^$"))
	}
}

// tags reads Tags.member.1.Key and so on. twice is a key that occurs more than once. Keys that
// differ only in case are the same.
func (v *violations) tags(params url.Values) (tags map[string]string, twice string) {
	folded := map[string]bool{}
	for i := 1; ; i++ {
		member := fmt.Sprintf("Tags.member.%d.", i)
		if _, given := params[member+"Key"]; !given {
			break
		}
		v.text(params, member+"Key", true, 1, 128, tagPattern)
		v.text(params, member+"Value", true, 0, 256, tagPattern)
		name := params.Get(member + "Key")
		if folded[strings.ToLower(name)] {
			twice = name
		}
		folded[strings.ToLower(name)] = true
		if tags == nil {
			tags = map[string]string{}
		}
		tags[name] = params.Get(member + "Value")
	}
	if len(folded) > maxTags {
		v.add("Tags", strconv.Itoa(len(folded)), fmt.Sprintf("Member must have length less than or equal to %d", maxTags))
	}
	return tags, twice
}

func (v violations) err() *apiError {
	noun := "errors"
	if len(v) == 1 {
		noun = "error"
	}
	return validation(fmt.Sprintf("%d validation %s detected: %s", len(v), noun, strings.Join(v, "; ")))
}

func validation(message string) *apiError {
	return refuse(http.StatusBadRequest, "ValidationError", "%s", message)
}
