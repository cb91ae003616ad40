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

// classify returns err as an *Error, or nil for nil. It classifies an error of the SDK by its code
// and, if the code is ambiguous, by its message.
// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html#API_AssumeRole_Errors
// https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html
func classify(err error) *Error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	e := &Error{Kind: Unavailable, Code: "RequestError", Message: err.Error()}
	ae, ok := errors.AsType[awserr.Error](err)
	if !ok {
		return e
	}
	e.Code, e.Message = ae.Code(), message(ae)
	switch e.Code {
	case "AccessDenied", "AccessDeniedException", "RegionDisabledException", "NoSuchEntity":
		e.Kind, e.Cause = Denied, denialCause(e.Code, e.Message)
	case "ValidationError", "ValidationException", "MalformedPolicyDocument", "PackedPolicyTooLarge", "InvalidParameterValue",
		"InvalidParameterCombination", "InvalidParameter", request.ParamRequiredErrCode:
		e.Kind = Malformed
	case "SignatureDoesNotMatch", "RequestExpired", "InvalidSignatureException":
		e.Kind = NodeCredentials
		if e.Cause = clockCause(e.Code, e.Message); e.Cause != "" {
			e.Kind = ClockSkew
		}
	case "ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException",
		"IncompleteSignature", "MissingAuthenticationToken", "OptInRequired",
		"NoCredentialProviders", "EC2RoleRequestError", "EmptyEC2RoleList", "CredentialsEndpointError", "SharedCredsLoad", "WebIdentityErr":
		e.Kind = NodeCredentials
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
	default:
		if isThrottled(err) {
			e.Kind = Throttled
		}
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

// message returns the text of an SDK error and its cause, on one line of at most maxMessage bytes.
// From the errors of a provider chain it includes only the last one, the metadata service's.
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

// signatureTime matches the times of the node and of STS in the error message for a signature whose
// time differs by more than 15 minutes. Both forms of the message are shown in
// https://github.com/aws/aws-cli/issues/6676.
var signatureTime = regexp.MustCompile(`Signature (?:expired|not yet current): (\d{8}T\d{6}Z) is .*\((\d{8}T\d{6}Z) [-+]`)

// clockCause says how the node's clock is wrong, or returns "" if the error has another cause.
func clockCause(code, message string) string {
	const basic = "20060102T150405Z"
	if match := signatureTime.FindStringSubmatch(message); match != nil {
		node, err1 := time.Parse(basic, match[1])
		sts, err2 := time.Parse(basic, match[2])
		if err1 == nil && err2 == nil {
			direction := "behind"
			if node.After(sts) {
				direction = "ahead of"
			}
			return fmt.Sprintf("the node's clock is %.0f minutes %s the clock of STS", sts.Sub(node).Abs().Minutes(), direction)
		}
	}
	if code == "RequestExpired" {
		return "the node's clock and the clock of STS are more than 15 minutes apart"
	}
	return ""
}

// denial matches the action that STS refuses, and the reason if STS states one.
// https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html
var denial = regexp.MustCompile(`not authorized to perform: (sts:[A-Za-z]{1,64})` +
	`(?:.* (because no [a-z -]{1,64} allows the sts:[A-Za-z]{1,64} action|with an explicit deny in [a-z -]{1,64}))?`)

// denialCause explains why STS refuses a role, or returns "" if the message does not say why. It
// omits the principal, which is the node's role.
func denialCause(code, message string) string {
	switch code {
	case "NoSuchEntity":
		return "the role does not exist"
	case "RegionDisabledException":
		return "STS is not activated in this region for the account"
	}
	match := denial.FindStringSubmatch(message)
	if match == nil {
		return ""
	}
	action, reason := match[1], match[2]
	switch {
	case strings.Contains(reason, "no identity-based policy"):
		return "this node lacks the permission " + action + " on the role"
	case strings.Contains(reason, "no role trust policy"), strings.Contains(reason, "no resource-based policy"),
		reason == "" && action != "sts:AssumeRole":
		return "the role's trust policy does not allow this node " + action
	case reason == "":
		// STS states no reason if the node's policies allow the call, because the reason would reveal
		// whether the role exists.
		return "the role does not exist, or its trust policy does not allow this node " + action
	}
	return "STS refuses this node " + action + " " + reason
}
