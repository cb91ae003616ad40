package credentials

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go/aws/awserr"
	"github.com/aws/aws-sdk-go/aws/request"
)

// classify converts an error of the SDK by its code and, if the code is ambiguous, by its message.
// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html#API_AssumeRole_Errors
// https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html
func classify(err error) *Error {
	e := &Error{Kind: Unavailable, Code: "RequestError", Message: err.Error()}
	ae, ok := errors.AsType[awserr.Error](err)
	if !ok {
		return e
	}
	e.Code, e.Message = ae.Code(), message(ae)
	switch e.Code {
	case "AccessDenied", "AccessDeniedException", "RegionDisabledException", "NoSuchEntity":
		e.Kind, e.Cause = Denied, denialCause(e.Code, e.Message)
		return e
	case "ValidationError", "ValidationException", "MalformedPolicyDocument", "PackedPolicyTooLarge", "InvalidParameterValue",
		"InvalidParameterCombination", "InvalidParameter", request.ParamRequiredErrCode:
		e.Kind = Malformed
		return e
	case "SignatureDoesNotMatch", "RequestExpired", "InvalidSignatureException":
		e.Kind = NodeCredentials
		if e.Cause = clockCause(e.Code, e.Message); e.Cause != "" {
			e.Kind = ClockSkew
		}
		return e
	case "ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException",
		"IncompleteSignature", "MissingAuthenticationToken", "OptInRequired",
		"NoCredentialProviders", "EC2RoleRequestError", "EmptyEC2RoleList", "CredentialsEndpointError", "SharedCredsLoad", "WebIdentityErr":
		e.Kind = NodeCredentials
		return e
	case intermediateCode:
		e.Kind = NodeCredentials
		switch cause := classify(ae.OrigErr()); cause.Kind {
		case Throttled, Unavailable, ClockSkew:
			e.Kind, e.Cause = cause.Kind, cause.Cause
		case Denied, Malformed:
			e.Cause = "STS refuses this node the role that --assume-role-arn names"
			if cause.Cause != "" {
				e.Cause += ": " + cause.Cause
			}
		}
		return e
	}
	if isThrottled(err) {
		e.Kind = Throttled
	}
	return e
}

// isThrottled reports whether STS refused a call because of too many calls.
func isThrottled(err error) bool {
	if request.IsErrorThrottle(err) {
		return true
	}
	rf, ok := errors.AsType[awserr.RequestFailure](err)
	return ok && rf.StatusCode() == http.StatusTooManyRequests
}

// message returns the text of an SDK error and its cause, on one line of at most maxMessage bytes. Of the
// errors of a provider chain it includes only the last one, which is the metadata service's.
func message(err awserr.Error) string {
	text := err.Message()
	if batch, ok := err.(awserr.BatchedErrors); ok && len(batch.OrigErrs()) > 1 {
		last := batch.OrigErrs()[len(batch.OrigErrs())-1]
		text += ": " + last.Error()
	} else if cause := err.OrigErr(); cause != nil {
		text += ": " + cause.Error()
	}
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage-3], "") + "..."
	}
	return text
}

// maxMessage bounds a message, which may contain an error page of the metadata service.
const maxMessage = 1024

// signatureTime matches the times of the node and of STS in the message about a signature that is more
// than 15 minutes off. https://github.com/aws/aws-cli/issues/6676 shows both forms.
var signatureTime = regexp.MustCompile(`Signature (?:expired|not yet current): (\d{8}T\d{6}Z) is .*\((\d{8}T\d{6}Z) [-+]`)

// clockCause explains a wrong clock, or returns "" for an error with another cause.
func clockCause(code, message string) string {
	if cause := clockDifference(message); cause != "" || code != "RequestExpired" {
		return cause
	}
	return "the node's clock and the clock of STS are more than 15 minutes apart"
}

// clockDifference describes the difference of the clocks in the message, or returns "" if it has none.
func clockDifference(message string) string {
	match := signatureTime.FindStringSubmatch(message)
	if match == nil {
		return ""
	}
	const basic = "20060102T150405Z"
	node, err1 := time.Parse(basic, match[1])
	sts, err2 := time.Parse(basic, match[2])
	if err1 != nil || err2 != nil {
		return ""
	}
	off, direction := sts.Sub(node), "behind"
	if off < 0 {
		off, direction = -off, "ahead of"
	}
	return fmt.Sprintf("the node's clock is %d minutes %s the clock of STS", off.Round(time.Minute)/time.Minute, direction)
}

// deniedAction matches the action that STS refuses, deniedBy the kind of policy that denies it
// explicitly, and notAllowedBy the kind of policy that does not allow it.
// https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html
var (
	deniedAction = regexp.MustCompile(`not authorized to perform: (sts:[A-Za-z]{1,64})`)
	deniedBy     = regexp.MustCompile(`with an explicit deny in (?:an? |the )?([a-z -]{1,64})`)
	notAllowedBy = regexp.MustCompile(`because no ([a-z -]{1,64}) allows the`)
)

// denialCause explains why STS refuses a role, or returns "" if the message does not say why. It omits
// the principal, which is the node's role.
func denialCause(code, message string) string {
	switch code {
	case "NoSuchEntity":
		return "the role does not exist"
	case "RegionDisabledException":
		return "STS is not activated in this region for the account"
	}
	match := deniedAction.FindStringSubmatch(message)
	if match == nil {
		return ""
	}
	action := match[1]
	if by := deniedBy.FindStringSubmatch(message); by != nil {
		return action + " is explicitly denied by this kind of policy: " + strings.TrimSpace(by[1])
	}
	if by := notAllowedBy.FindStringSubmatch(message); by != nil {
		switch kind := by[1]; kind {
		case "identity-based policy":
			return "this node lacks the permission " + action + " on the role"
		case "role trust policy", "resource-based policy":
			return "the role's trust policy does not allow this node " + action
		default:
			return "no " + kind + " allows " + action
		}
	}
	if action == "sts:AssumeRole" {
		// STS gives no reason if the node's policies allow the call: it does not reveal which roles exist.
		return "the role does not exist, or its trust policy does not allow this node " + action
	}
	return "the role's trust policy does not allow this node " + action
}
