package sts

import (
	"strings"
	"time"
)

// Principal is who signs requests with an access key: an IAM user, an instance with its role, or a session.
type Principal struct {
	AccessKeyID, SecretAccessKey string
	// SessionToken must come with every request, where not empty.
	SessionToken string
	// ARN is how IAM names the principal, as arn:aws:sts::123456789012:assumed-role/node/i-0123 for an instance.
	ARN string
	// UserID is the principal's unique ID, as AROA…:i-0123 for an instance.
	UserID string
	// Expires is when the credentials cease to be valid; zero for never.
	Expires time.Time
	// MayNotAssume: no policy of the principal's own allows it sts:AssumeRole.
	MayNotAssume bool

	// chained sessions came out of AssumeRole, so what they assume lasts an hour at most. An instance's do not count as such
	// (IAM User Guide, "Roles terms and concepts": role chaining).
	chained bool
}

// account is the account ID in an ARN.
func account(arn string) string {
	if parts := strings.SplitN(arn, ":", 6); len(parts) == 6 {
		return parts[4]
	}
	return ""
}

// partition is the partition in an ARN, as "aws" or "aws-cn".
func partition(arn string) string {
	if parts := strings.SplitN(arn, ":", 3); len(parts) == 3 {
		return parts[1]
	}
	return ""
}

// Role is an IAM role with the part of its trust policy that STS decides by.
type Role struct {
	// ARN as arn:aws:iam::123456789012:role/path/name.
	ARN string
	// Trusts are the principals that may assume it: a role or user by its ARN, a session by its own, or a whole account by
	// its number or as arn:aws:iam::123456789012:root.
	Trusts []string
	// ExternalID, where not empty, is the external ID that the request must carry.
	ExternalID string
	// RefusesTags: the policy lacks sts:TagSession, without which session tags are refused.
	RefusesTags bool
	// RefusesSourceIdentity: the policy lacks sts:SetSourceIdentity.
	RefusesSourceIdentity bool
	// MaxDuration is the role's maximum session duration; zero is IAM's default, an hour.
	MaxDuration time.Duration
}

func (r Role) maxDuration() time.Duration {
	if r.MaxDuration == 0 {
		return time.Hour
	}
	return r.MaxDuration
}

// name is the last part of the role's ARN: a session's ARN has it without the path.
func (r Role) name() string { return r.ARN[strings.LastIndexByte(r.ARN, '/')+1:] }

// trusts tells whether the policy names the caller: itself, its role, or its account.
func (r Role) trusts(caller Principal) bool {
	for _, t := range r.Trusts {
		switch {
		case t == caller.ARN,
			t == account(caller.ARN),
			t == "arn:"+partition(caller.ARN)+":iam::"+account(caller.ARN)+":root",
			isSessionOf(caller.ARN, t):
			return true
		}
	}
	return false
}

// isSessionOf tells whether the ARN is of a session of the role.
func isSessionOf(session, role string) bool {
	rest, ok := strings.CutPrefix(session, "arn:"+partition(role)+":sts::"+account(role)+":assumed-role/")
	name, _, _ := strings.Cut(rest, "/")
	return ok && strings.Contains(role, ":role/") && name == Role{ARN: role}.name()
}
