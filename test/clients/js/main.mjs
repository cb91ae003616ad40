// A user's program with the AWS SDK for JavaScript, version 3: see ../main.go for what it prints, and when.
import { createInterface } from "node:readline";
import { fromNodeProviderChain } from "@aws-sdk/credential-providers";

async function print() {
  const { accessKeyId, sessionToken } = await fromNodeProviderChain()();
  console.log(accessKeyId, sessionToken);
}

try {
  await print();
  for await (const _ of createInterface({ input: process.stdin })) await print();
} catch (error) {
  for (let e = error; e; e = e.cause) console.error(`${e.name}: ${e.message}`);
  process.exitCode = 1;
}
