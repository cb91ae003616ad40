// A user's program with the AWS SDK for JavaScript, version 2: see ../main.go for what it prints, and when.
import { createInterface } from "node:readline";
import AWS from "aws-sdk";

// The SDK's callback, which comes with an error or without, is all that a program hears.
function print(done) {
  const credentials = new AWS.EC2MetadataCredentials();
  credentials.get((error) => {
    if (error) {
      console.error(`${error.name}: ${error.message}`);
      process.exit(1);
    }
    console.log(credentials.accessKeyId, credentials.sessionToken);
    done();
  });
}

print(() => createInterface({ input: process.stdin }).on("line", () => print(() => {})));
