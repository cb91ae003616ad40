// Command clients gets the credentials of the pod that it runs in, as a user's program does: by an
// unmodified SDK, from the default chain, without an endpoint or credentials of its own.
//
//	clients go-v1|go-v2|minio-go
//
// It prints the access key ID and the session token. For each line on standard input it gets new
// ones and prints them.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	awsv1 "github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// get retrieves credentials with an SDK, past the SDK's own cache.
type get func(ctx context.Context) (accessKeyID, sessionToken string, err error)

func main() {
	get, err := client(os.Args[1:])
	if err == nil {
		err = run(get)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func client(args []string) (get, error) {
	if len(args) != 1 {
		return nil, errors.New("usage: clients go-v1|go-v2|minio-go")
	}
	switch args[0] {
	case "go-v1":
		return goV1()
	case "go-v2":
		return goV2()
	case "minio-go":
		return minioGo(), nil
	}
	return nil, fmt.Errorf("no client %q", args[0])
}

func run(get get) error {
	lines := bufio.NewScanner(os.Stdin)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		id, token, err := get(ctx)
		cancel()
		if err != nil {
			return err
		}
		fmt.Println(id, token)
		if !lines.Scan() {
			return lines.Err()
		}
	}
}

func goV1() (get, error) {
	// By default the SDK reports no reason.
	verbose := true
	s, err := session.NewSession(&awsv1.Config{CredentialsChainVerboseErrors: &verbose})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) (string, string, error) {
		s.Config.Credentials.Expire()
		v, err := s.Config.Credentials.GetWithContext(ctx)
		return v.AccessKeyID, v.SessionToken, err
	}, nil
}

func goV2() (get, error) {
	c, err := config.LoadDefaultConfig(context.Background(), config.WithRegion("eu-west-1"))
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) (string, string, error) {
		c.Credentials.(*aws.CredentialsCache).Invalidate()
		v, err := c.Credentials.Retrieve(ctx)
		return v.AccessKeyID, v.SessionToken, err
	}, nil
}

func minioGo() get {
	c := credentials.NewIAM("")
	return func(context.Context) (string, string, error) {
		c.Expire()
		v, err := c.GetWithContext(nil)
		return v.AccessKeyID, v.SessionToken, err
	}
}
