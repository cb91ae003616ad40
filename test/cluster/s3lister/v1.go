package main

import (
	"context"
	"fmt"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/s3"
)

func listV1(ctx context.Context, endpoint, bucket string) (*listing, error) {
	sess, err := session.NewSession()
	if err != nil {
		return nil, fmt.Errorf("session: %w", err)
	}
	credentials, err := sess.Config.Credentials.GetWithContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	client := s3.New(sess, &aws.Config{Endpoint: aws.String(endpoint), S3ForcePathStyle: aws.Bool(true)})
	out, err := client.ListObjectsV2WithContext(ctx, &s3.ListObjectsV2Input{Bucket: aws.String(bucket)})
	if err != nil {
		return nil, fmt.Errorf("list bucket %s: %w", bucket, err)
	}
	found := &listing{SDK: "v1", Provider: credentials.ProviderName, AccessKeyID: credentials.AccessKeyID}
	for _, object := range out.Contents {
		found.Objects = append(found.Objects, aws.StringValue(object.Key))
	}
	return found, nil
}
