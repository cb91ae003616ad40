package roles

import (
	"fmt"
	"regexp"
	"strings"
)

// AssumeRole documents the lengths, CreateRole the alphabets of path and name.
// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html
// https://docs.aws.amazon.com/IAM/latest/APIReference/API_CreateRole.html
var (
	roleARN = regexp.MustCompile(`^arn:aws[a-z0-9-]{0,30}:iam::[0-9]{12}:role/([\x21-\x2e\x30-\x7e]+/)*[\w+=,.@-]{1,64}$`)
	baseARN = regexp.MustCompile(`^arn:aws[a-z0-9-]{0,30}:iam::[0-9]{12}:role/([\x21-\x2e\x30-\x7e]+/)*$`)
)

const minARN, maxARN = 20, 2048

// ValidateARN returns an error if arn is not the ARN of an IAM role.
func ValidateARN(arn string) error {
	if len(arn) < minARN || len(arn) > maxARN || !roleARN.MatchString(arn) {
		return fmt.Errorf("%q is not the ARN of an IAM role (arn:PARTITION:iam::ACCOUNT:role/NAME)", shorten(arn))
	}
	return nil
}

// ParseBaseARN validates the prefix that completes role names. It returns the prefix with a closing slash.
func ParseBaseARN(prefix string) (string, error) {
	if !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	if !baseARN.MatchString(prefix) {
		return "", fmt.Errorf("%q is not the prefix of IAM role ARNs (arn:PARTITION:iam::ACCOUNT:role/)", shorten(prefix))
	}
	return prefix, nil
}

// shorten truncates a value from an annotation, which may be 256 KiB, for an error message.
func shorten(s string) string {
	const limit = 128
	if len(s) <= limit {
		return s
	}
	return s[:limit] + "…"
}
