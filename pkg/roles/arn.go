package roles

import (
	"fmt"
	"regexp"
	"strings"
)

// The formats are those of the API references: AssumeRole for lengths, CreateRole for the alphabets of path and name.
// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html
// https://docs.aws.amazon.com/IAM/latest/APIReference/API_CreateRole.html
var (
	roleARN    = regexp.MustCompile(`^arn:aws[a-z0-9-]{0,30}:iam::[0-9]{12}:role/([\x21-\x2e\x30-\x7e]+/)*[\w+=,.@-]{1,64}$`)
	basePrefix = regexp.MustCompile(`^arn:aws[a-z0-9-]{0,30}:iam::[0-9]{12}:role/([\x21-\x2e\x30-\x7e]+/)*$`)
	externalID = regexp.MustCompile(`^[\w+=,.@:/-]+$`)
)

const (
	minARN = 20
	maxARN = 2048

	minExternalID = 2
	maxExternalID = 1224
)

// ValidARN is an error for what is not the ARN of an IAM role.
func ValidARN(arn string) error {
	if len(arn) < minARN || len(arn) > maxARN || !roleARN.MatchString(arn) {
		return fmt.Errorf("%q is not the ARN of an IAM role (arn:PARTITION:iam::ACCOUNT:role/NAME)", shorten(arn))
	}
	return nil
}

func validExternalID(id string) error {
	if len(id) < minExternalID || len(id) > maxExternalID || !externalID.MatchString(id) {
		// It is a shared secret of a kind: it is not repeated.
		return fmt.Errorf("it is not an external ID: %d to %d of letters, digits and _+=,.@:/-", minExternalID, maxExternalID)
	}
	return nil
}

// BaseARN checks the prefix that completes bare role names and gives it its closing slash.
func BaseARN(prefix string) (string, error) {
	if !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	if !basePrefix.MatchString(prefix) {
		return "", fmt.Errorf("%q is not the prefix of IAM role ARNs (arn:PARTITION:iam::ACCOUNT:role/)", shorten(prefix))
	}
	return prefix, nil
}

func roleName(arn string) string { return arn[strings.LastIndexByte(arn, '/')+1:] }

// shorten keeps what a pod's owner wrote from filling the log.
func shorten(s string) string {
	const most = 128
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
