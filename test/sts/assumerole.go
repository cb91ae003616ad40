package sts

import (
	"net/http"
	"net/url"
	"time"
)

// assumeRole is the AssumeRole action. It checks the limits, then the trust policy, then the
// durations that depend on the role.
func (s *Server) assumeRole(caller Principal, params url.Values, call *Call) (func(id string) any, *apiError) {
	in, err := assumeRoleInput(params)
	s.change(call, func(c *Call) {
		c.RoleARN, c.SessionName, c.ExternalID = in.roleARN, in.sessionName, in.externalID
		c.SourceIdentity, c.Policy, c.Duration, c.Tags = in.sourceIdentity, in.policy, in.duration, in.tags
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if caller.MayNotAssume {
		e := denied(caller, "sts:AssumeRole", in.roleARN)
		e.Message += " because no identity-based policy allows the sts:AssumeRole action"
		return nil, e
	}
	// A role that does not exist and one that does not trust the caller have the same error: a
	// caller cannot find out which roles exist.
	role, exists := s.roles[in.roleARN]
	if !exists || !role.trusts(caller) || role.ExternalID != "" && role.ExternalID != in.externalID {
		return nil, denied(caller, "sts:AssumeRole", in.roleARN)
	}
	if len(in.tags) > 0 && role.RefusesTags {
		return nil, denied(caller, "sts:TagSession", in.roleARN)
	}
	if in.sourceIdentity != "" && role.RefusesSourceIdentity {
		return nil, denied(caller, "sts:SetSourceIdentity", in.roleARN)
	}
	if caller.chained && in.duration > time.Hour {
		return nil, validation("The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining")
	}
	if in.duration > role.maxDuration() {
		return nil, validation("The requested DurationSeconds exceeds the MaxSessionDuration set for this role.")
	}
	session := newSession(role, in.sessionName, s.now().Add(in.duration))
	s.principals[session.AccessKeyID] = session
	call.Issued = session.AccessKeyID
	return func(id string) any {
		var out assumeRoleResponse
		out.Result.SourceIdentity = in.sourceIdentity
		out.Result.AssumedRoleUser.Arn = session.ARN
		out.Result.AssumedRoleUser.AssumedRoleID = session.UserID
		out.Result.Credentials.AccessKeyID = session.AccessKeyID
		out.Result.Credentials.SecretAccessKey = session.SecretAccessKey
		out.Result.Credentials.SessionToken = session.SessionToken
		out.Result.Credentials.Expiration = session.Expires.UTC().Format(time.RFC3339)
		if in.policy != "" || len(in.tags) > 0 {
			packed := in.packedPercent()
			out.Result.PackedPolicySize = &packed
		}
		out.Metadata.RequestID = id
		return out
	}, nil
}

func denied(caller Principal, action, resource string) *apiError {
	return refuse(http.StatusForbidden, "AccessDenied", "User: %s is not authorized to perform: %s on resource: %s", caller.ARN, action, resource)
}

// newSession makes the credentials of a new session.
func newSession(role Role, name string, expires time.Time) Principal {
	return Principal{
		AccessKeyID:     "ASIA" + randomBase32(16),
		SecretAccessKey: randomBase64(40),
		SessionToken:    randomBase64(340),
		ARN:             "arn:" + partition(role.ARN) + ":sts::" + account(role.ARN) + ":assumed-role/" + role.name() + "/" + name,
		UserID:          roleID(role.ARN) + ":" + name,
		// The answer contains whole seconds, so the server enforces whole seconds too.
		Expires: expires.Truncate(time.Second),
		chained: true,
	}
}

// packedPercent returns how much of the allowed size the policy and the tags use. It approximates
// AWS's undocumented measure.
func (in roleInput) packedPercent() int {
	n := len(in.policy)
	for k, v := range in.tags {
		n += len(k) + len(v)
	}
	return n*100/4096 + 1
}
