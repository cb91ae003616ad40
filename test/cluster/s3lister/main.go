// Command s3lister lists a bucket as a program on EC2 does: with a region, and without keys,
// profile or endpoint of a metadata service. The AWS SDK finds its credentials by its default
// chain.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"time"
)

// listing is the result of one SDK.
type listing struct {
	SDK         string   `json:"sdk"`
	Provider    string   `json:"provider"` // the SDK's name for the link that had the credentials
	AccessKeyID string   `json:"accessKeyID"`
	Objects     []string `json:"objects"`
}

// list lists a bucket of the S3 at endpoint, with one version of the SDK.
type list func(ctx context.Context, endpoint, bucket string) (*listing, error)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("s3lister", flag.ContinueOnError)
	sdk := flags.String("sdk", "", "v1 or v2")
	endpoint := flags.String("endpoint", "", "URL of the S3 to ask")
	bucket := flags.String("bucket", "", "bucket to list")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	lister, ok := map[string]list{"v1": listV1, "v2": listV2}[*sdk]
	if !ok {
		fmt.Fprintf(os.Stderr, "s3lister: -sdk %q: neither v1 nor v2\n", *sdk)
		return 2
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	found, err := lister(ctx, *endpoint, *bucket)
	if err != nil {
		fmt.Fprintf(os.Stderr, "s3lister: sdk %s: %v\n", *sdk, err)
		return 1
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		fmt.Fprintf(os.Stderr, "s3lister: %v\n", err)
		return 1
	}
	return 0
}
