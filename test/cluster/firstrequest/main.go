// Command firstrequest asks for credentials once, as an SDK with a single one-second try does: a
// token, the role's name, the credentials. It prints the result as one line of JSON and stays until
// SIGTERM.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const (
	service = "http://169.254.169.254/latest/"
	roles   = "meta-data/iam/security-credentials/"

	// try bounds one request. No SDK waits longer for the metadata service.
	try = time.Second
)

// outcome is the result of the first request.
type outcome struct {
	Role         string `json:"role,omitempty"`
	AccessKeyID  string `json:"accessKeyID,omitempty"`
	Error        string `json:"error,omitempty"`
	Milliseconds int64  `json:"milliseconds"` // of the three requests together
}

func main() {
	began := time.Now()
	role, accessKeyID, err := credentials(&http.Client{Timeout: try})
	result := outcome{Role: role, AccessKeyID: accessKeyID, Milliseconds: time.Since(began).Milliseconds()}
	if err != nil {
		result.Error = err.Error()
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		fmt.Fprintf(os.Stderr, "firstrequest: %v\n", err)
		os.Exit(1)
	}
	<-stop
}

func credentials(client *http.Client) (role, accessKeyID string, err error) {
	token, err := ask(client, http.MethodPut, "api/token", "X-aws-ec2-metadata-token-ttl-seconds", "21600")
	if err != nil {
		return "", "", err
	}
	role, err = ask(client, http.MethodGet, roles, "X-aws-ec2-metadata-token", token)
	if err != nil {
		return "", "", err
	}
	text, err := ask(client, http.MethodGet, roles+role, "X-aws-ec2-metadata-token", token)
	if err != nil {
		return role, "", err
	}
	var document struct{ Code, AccessKeyId, SecretAccessKey, Token string }
	if err := json.Unmarshal([]byte(text), &document); err != nil {
		return role, "", fmt.Errorf("credentials of %s: %w", role, err)
	}
	if document.Code != "Success" || document.AccessKeyId == "" || document.SecretAccessKey == "" || document.Token == "" {
		return role, "", fmt.Errorf("credentials of %s: code %q, or a field is empty", role, document.Code)
	}
	return role, document.AccessKeyId, nil
}

func ask(client *http.Client, method, path, header, value string) (string, error) {
	request, err := http.NewRequest(method, service+path, nil)
	if err != nil {
		return "", err
	}
	request.Header.Set(header, value)
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", method, path, err)
	}
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s %s: %s: %s", method, path, response.Status, strings.TrimSpace(string(body)))
	}
	return string(body), nil
}
