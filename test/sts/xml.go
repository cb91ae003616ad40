package sts

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"encoding/xml"
	"fmt"
	"net/http"
	"strings"
)

type metadata struct {
	RequestID string `xml:"RequestId"`
}

type assumeRoleResponse struct {
	XMLName xml.Name `xml:"https://sts.amazonaws.com/doc/2011-06-15/ AssumeRoleResponse"`
	Result  struct {
		SourceIdentity  string `xml:",omitempty"`
		AssumedRoleUser struct {
			Arn           string
			AssumedRoleID string `xml:"AssumedRoleId"`
		}
		Credentials struct {
			AccessKeyID     string `xml:"AccessKeyId"`
			SecretAccessKey string
			SessionToken    string
			Expiration      string
		}
		PackedPolicySize *int `xml:",omitempty"`
	} `xml:"AssumeRoleResult"`
	Metadata metadata `xml:"ResponseMetadata"`
}

type callerIdentityResponse struct {
	XMLName xml.Name `xml:"https://sts.amazonaws.com/doc/2011-06-15/ GetCallerIdentityResponse"`
	Result  struct {
		Arn     string
		UserID  string `xml:"UserId"`
		Account string
	} `xml:"GetCallerIdentityResult"`
	Metadata metadata `xml:"ResponseMetadata"`
}

func callerIdentity(caller Principal, id string) callerIdentityResponse {
	var out callerIdentityResponse
	out.Result.Arn, out.Result.UserID, out.Result.Account = caller.ARN, caller.UserID, account(caller.ARN)
	out.Metadata.RequestID = id
	return out
}

type errorResponse struct {
	XMLName   xml.Name `xml:"https://sts.amazonaws.com/doc/2011-06-15/ ErrorResponse"`
	Error     apiError
	RequestID string `xml:"RequestId"`
}

// apiError is an error of the Query API. Type is Sender for an error of the client, else Receiver.
type apiError struct {
	Type, Code, Message string
	status              int
}

func refuse(status int, code, format string, args ...any) *apiError {
	e := &apiError{Type: "Sender", Code: code, Message: fmt.Sprintf(format, args...), status: status}
	if status >= http.StatusInternalServerError {
		e.Type = "Receiver"
	}
	return e
}

func writeXML(w http.ResponseWriter, status int, requestID string, body any) {
	data, err := xml.MarshalIndent(body, "", "  ")
	if err != nil {
		panic(err) // a type of this file that cannot be marshalled
	}
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("X-Amzn-RequestId", requestID)
	w.WriteHeader(status)
	w.Write(append(data, '\n'))
}

// newRequestID returns a random UUID (version 4).
func newRequestID() string {
	b := make([]byte, 16)
	rand.Read(b)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func randomBase32(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return base32.StdEncoding.EncodeToString(b)[:n]
}

func randomBase64(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return base64.StdEncoding.EncodeToString(b)[:n]
}

// roleID returns a role's unique ID, which depends on the role only.
func roleID(arn string) string {
	sum := sha256.Sum256([]byte(arn))
	return "AROA" + strings.TrimRight(base32.StdEncoding.EncodeToString(sum[:]), "=")[:17]
}
