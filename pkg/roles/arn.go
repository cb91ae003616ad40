package roles

import (
	"fmt"
	"regexp"
	"strings"
)

// roleARN matches the ARN of a role. AssumeRole documents the ARN's length, CreateRole the
// characters of path and name.
// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html
// https://docs.aws.amazon.com/IAM/latest/APIReference/API_CreateRole.html
var roleARN = regexp.MustCompile(`^arn:aws[a-z0-9-]{0,30}:iam::[0-9]{12}:role/([\x21-\x2e\x30-\x7e]+/)*[\w+=,.@-]{1,64}$`)

const maxARN = 2048

// ValidateARN returns an error if arn is not the ARN of an IAM role.
func ValidateARN(arn string) error {
	if len(arn) > maxARN || !roleARN.MatchString(arn) {
		return fmt.Errorf("%.128q is not the ARN of an IAM role (arn:PARTITION:iam::ACCOUNT:role/NAME)", arn)
	}
	return nil
}

// ParseBaseARN validates the prefix that completes role names to ARNs. It returns the prefix with a
// slash at its end.
func ParseBaseARN(prefix string) (string, error) {
	if !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	if ValidateARN(prefix+"name") != nil {
		return "", fmt.Errorf("%.128q is not the prefix of IAM role ARNs (arn:PARTITION:iam::ACCOUNT:role/)", prefix)
	}
	return prefix, nil
}

// completeARN returns the ARN of a role. The argument is the ARN itself, or the role's path and
// name under BaseARN.
func (r *Rules) completeARN(role string) (string, error) {
	arn := role
	if !strings.HasPrefix(role, "arn:") {
		if r.BaseARN == "" {
			return "", fmt.Errorf("%.128q is a role's name, and the proxy's --base-role-arn, which would complete it to an ARN, is not set", role)
		}
		arn = r.BaseARN + strings.TrimPrefix(role, "/")
	}
	return arn, ValidateARN(arn)
}
