package sts

import (
	"strings"
	"time"
)

// Principal signs requests with an access key: an IAM user, an instance with its role, or a
// session.
type Principal struct {
	AccessKeyID, SecretAccessKey string
	// SessionToken, if not empty, must come with every request.
	SessionToken string
	// ARN is the principal's ARN, as arn:aws:sts::123456789012:assumed-role/node/i-0123 for an
	// instance.
	ARN string
	// UserID is the principal's unique ID, as AROA…:i-0123 for an instance.
	UserID string
	// Expires is the end of the credentials' validity. Zero means never.
	Expires time.Time
	// MayNotAssume is set if no policy of the principal allows sts:AssumeRole.
	MayNotAssume bool

	// chained is set for sessions of AssumeRole: a role that they assume lasts an hour at most. It
	// is not set for instances (IAM User Guide, "Roles terms and concepts": role chaining).
	chained bool
}

// account returns the account ID in an ARN.
func account(arn string) string {
	if parts := strings.SplitN(arn, ":", 6); len(parts) == 6 {
		return parts[4]
	}
	return ""
}

// partition returns the partition in an ARN, as "aws" or "aws-cn".
func partition(arn string) string {
	if parts := strings.SplitN(arn, ":", 3); len(parts) == 3 {
		return parts[1]
	}
	return ""
}

// Role is an IAM role with the parts of its trust policy that STS evaluates.
type Role struct {
	// ARN is the role's ARN, as arn:aws:iam::123456789012:role/path/name.
	ARN string
	// Trusts are the principals that may assume the role: a role, user or session by its ARN, or an
	// account by its number or as arn:aws:iam::123456789012:root.
	Trusts []string
	// ExternalID, if not empty, must come with the request.
	ExternalID string
	// RefusesTags is set if the policy lacks sts:TagSession, without which session tags are
	// refused.
	RefusesTags bool
	// RefusesSourceIdentity is set if the policy lacks sts:SetSourceIdentity.
	RefusesSourceIdentity bool
	// MaxDuration is the role's maximum session duration. Zero is IAM's default of an hour.
	MaxDuration time.Duration
}

func (r Role) maxDuration() time.Duration {
	if r.MaxDuration == 0 {
		return time.Hour
	}
	return r.MaxDuration
}

// name returns the last part of the role's ARN. A session's ARN has it without the path.
func (r Role) name() string { return r.ARN[strings.LastIndexByte(r.ARN, '/')+1:] }

// trusts reports whether the policy names the caller, its role or its account.
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

// isSessionOf reports whether the ARN is that of a session of the role.
func isSessionOf(session, role string) bool {
	rest, ok := strings.CutPrefix(session, "arn:"+partition(role)+":sts::"+account(role)+":assumed-role/")
	name, _, _ := strings.Cut(rest, "/")
	return ok && strings.Contains(role, ":role/") && name == Role{ARN: role}.name()
}
