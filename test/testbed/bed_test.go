package testbed

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/credentials"
	"github.com/aws/aws-sdk-go/aws/session"
	awssts "github.com/aws/aws-sdk-go/service/sts"
	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestMain(m *testing.M) { netnstest.MainAsRoot(m) }

func newBed(t *testing.T, o Options) *Bed {
	t.Helper()
	tools, err := BuildTools(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	o.Tools = tools
	b, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if err := b.Close(); err != nil {
			t.Errorf("closed again: %v", err)
		}
		if _, err := os.Stat(b.Dir); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", b.Dir, err)
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil || strings.Contains(string(mounts), b.Dir) {
			t.Errorf("a mount below %s is left: %v", b.Dir, err)
		}
	})
	return b
}

// get returns the body of a GET from the namespace.
func get(t *testing.T, n *netnstest.Namespace, url string) string {
	t.Helper()
	resp, err := n.HTTP().Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v: %s", url, resp.Status, err, body)
	}
	return string(body)
}

// TestUnguardedPodGetsNodeCredentials is the control of every test that a pod cannot have them:
// with the primary plugin alone it gets valid credentials, and the testbed reports it.
func TestUnguardedPodGetsNodeCredentials(t *testing.T) {
	for _, primary := range []string{"bridge", "ptp"} {
		t.Run(primary, func(t *testing.T) {
			t.Parallel()
			b := newBed(t, Options{Primary: primary})
			pod, err := b.RunPod(t.Context(), "default", "thief", nil)
			if err != nil {
				t.Fatal(err)
			}
			if !PodSubnet.Contains(pod.IP) {
				t.Errorf("the pod's IP is %s, not in %s", pod.IP, PodSubnet)
			}
			const metadata = "http://" + MetadataAddr
			if got := get(t, pod.Netns, metadata+"/latest/meta-data/instance-id"); got != InstanceID {
				t.Errorf("instance-id %q, want %q", got, InstanceID)
			}
			if got := get(t, pod.Netns, metadata+"/latest/meta-data/placement/availability-zone/"); got != AvailabilityZone {
				t.Errorf("availability zone %q, want %q", got, AvailabilityZone)
			}
			if leaks := b.Leaks(); len(leaks) != 0 {
				t.Errorf("leaks before anything was asked: %v", leaks)
			}
			role := get(t, pod.Netns, metadata+credentialsPath)
			var vended struct{ Code, AccessKeyID, SecretAccessKey, Token string }
			if err := json.Unmarshal([]byte(get(t, pod.Netns, metadata+credentialsPath+role)), &vended); err != nil {
				t.Fatal(err)
			}
			if role != NodeRole || vended.Code != "Success" || vended.AccessKeyID != NodeAccessKeyID {
				t.Errorf("role %q: %s %s, want the node's", role, vended.Code, vended.AccessKeyID)
			}
			leaks := b.Leaks()
			if len(leaks) != 2 || leaks[0].Source != pod.IP || leaks[1].URI != credentialsPath+NodeRole {
				t.Errorf("leaks %v, want the two requests of %s", leaks, pod.IP)
			}

			sess, err := session.NewSession(&aws.Config{
				Region: aws.String(Region), Endpoint: aws.String(b.STS.URL()), HTTPClient: pod.Netns.HTTP(),
				Credentials: credentials.NewStaticCredentials(vended.AccessKeyID, vended.SecretAccessKey, vended.Token),
			})
			if err != nil {
				t.Fatal(err)
			}
			me, err := awssts.New(sess).GetCallerIdentity(nil)
			if err != nil {
				t.Fatal(err)
			}
			if *me.Arn != nodePrincipal.ARN {
				t.Errorf("the credentials are %s's, want %s's", *me.Arn, nodePrincipal.ARN)
			}
			if err := b.StopPod(t.Context(), pod); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestNodeOwnCredentials: the requests of the SDK on the node for its own credentials are no
// leaks.
func TestNodeOwnCredentials(t *testing.T) {
	b := newBed(t, Options{Primary: "ptp"})
	sess, err := session.NewSession(&aws.Config{
		Region: aws.String(Region), Endpoint: aws.String(b.STS.URL()), HTTPClient: b.Node.HTTP(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(t.TempDir(), "none"))
	role := b.PutRole("app", "")
	out, err := awssts.New(sess).AssumeRole(&awssts.AssumeRoleInput{RoleArn: &role, RoleSessionName: aws.String("default.web")})
	if err != nil {
		t.Fatal(err)
	}
	if got := *out.AssumedRoleUser.Arn; got != "arn:aws:sts::"+Account+":assumed-role/app/default.web" {
		t.Errorf("assumed %s", got)
	}
	if got := len(b.IMDS.CredentialRequests()); got != 2 {
		t.Errorf("%d requests for credentials, want the role and its credentials", got)
	}
	if leaks := b.Leaks(); len(leaks) != 0 {
		t.Errorf("leaks %v, want none", leaks)
	}
}

func TestPodLife(t *testing.T) {
	b := newBed(t, Options{Primary: "bridge", NoBridgeNF: true})
	ctx := t.Context()
	pod, err := b.RunPod(ctx, "team", "web-0", map[string]string{"iam.amazonaws.com/role": "app"})
	if err != nil {
		t.Fatal(err)
	}
	api, err := kubernetes.NewForConfig(&rest.Config{Host: b.KubeAPI.URL(), Dial: b.Node.DialContext, TLSClientConfig: rest.TLSClientConfig{CAData: b.KubeAPI.CA()}})
	if err != nil {
		t.Fatal(err)
	}
	seen, err := api.CoreV1().Pods("team").Get(ctx, "web-0", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if seen.Status.PodIP != pod.IP.String() || seen.Status.Phase != corev1.PodRunning || string(seen.UID) != pod.UID || seen.Spec.NodeName != NodeName {
		t.Errorf("the API server has %s %s %s on %s", seen.UID, seen.Status.Phase, seen.Status.PodIP, seen.Spec.NodeName)
	}
	want := [][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "team"}, {"K8S_POD_NAME", "web-0"},
		{"K8S_POD_INFRA_CONTAINER_ID", pod.ContainerID}, {"K8S_POD_UID", pod.UID},
	}
	if diff := cmp.Diff(want, pod.Runtime().Args); diff != "" {
		t.Errorf("CNI_ARGS (-want +got):\n%s", diff)
	}
	if err := b.Status(ctx); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	if err := b.Check(ctx, pod); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	links, err := b.Node.Run(ctx, b.ClientEnv(), "ip", "-o", "link", "show", "master", "cni0")
	if err != nil || strings.Count(links, "\n") != 1 {
		t.Errorf("ports of the bridge: %v\n%s", err, links)
	}
	nf, err := b.Node.Run(ctx, b.ClientEnv(), "cat", "/proc/sys/net/bridge/bridge-nf-call-iptables")
	if err == nil && nf != "0\n" {
		t.Errorf("bridge-nf-call-iptables is %q", nf)
	}

	// The next sandbox can have the same IP, once it is free.
	heir, err := b.NewSandbox("team", "heir", "uid")
	if err != nil {
		t.Fatal(err)
	}
	heir.IP = pod.IP
	if err := b.Add(ctx, heir); err == nil {
		t.Errorf("ADD gave %s twice", pod.IP)
	}
	// As a runtime does after an ADD that failed.
	if err := b.Del(ctx, heir.Runtime()); err != nil {
		t.Errorf("DEL after a failed ADD: %v", err)
	}
	if err := b.StopPod(ctx, pod); err != nil {
		t.Fatal(err)
	}
	if err := b.Add(ctx, heir); err != nil || heir.IP != pod.IP {
		t.Errorf("the heir has %s, %v, want %s", heir.IP, err, pod.IP)
	}
	if err := b.GC(ctx); err != nil {
		t.Errorf("GC: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(b.Dir, "ipam", Network, "10.*")); err != nil || len(left) != 0 {
		t.Errorf("after GC of everything host-local still holds %v, %v", left, err)
	}
	if _, err := b.Node.Run(ctx, nil, "/bin/sh", "-c", "echo no >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "exit status 3: no") {
		t.Errorf("a program that fails: %v", err)
	}
}

func TestFailedSetupLeavesNothing(t *testing.T) {
	before, err := filepath.Glob(dirPattern + fmt.Sprint(os.Getpid()) + ".*")
	if err != nil {
		t.Fatal(err)
	}
	// Without its tools the testbed fails at the last step, with the namespaces made and the
	// stand-ins up.
	if b, err := New(t.Context(), Options{Primary: "bridge", Tools: Tools{t.TempDir()}}); err == nil || !strings.Contains(err.Error(), "ec2-metadata-mock") {
		t.Fatalf("%v, %v, want an error that names what is missing", b, err)
	}
	after, err := filepath.Glob(dirPattern + fmt.Sprint(os.Getpid()) + ".*")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("testbeds (-before +after):\n%s", diff)
	}
}

// TestSweep: a new testbed removes what a killed process left. No process can have the process
// ID of this one.
func TestSweep(t *testing.T) {
	dir := dirPattern + "4194305.killed"
	if err := os.MkdirAll(filepath.Join(dir, "netns"), 0o755); err != nil {
		t.Fatal(err)
	}
	n, err := netnstest.CreateAt(filepath.Join(dir, "netns", "node"))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.NsHandle.Close(); err != nil {
		t.Fatal(err)
	}
	mine := dirPattern + fmt.Sprint(os.Getpid()) + ".alive"
	if err := os.Mkdir(mine, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(mine)
	sweep()
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", dir, err)
	}
	if _, err := os.Stat(mine); err != nil {
		t.Errorf("a living process's testbed: %v", err)
	}
}

func TestProcess(t *testing.T) {
	b := newBed(t, Options{Primary: "ptp"})
	start := func(script string) *Process {
		t.Helper()
		p, err := b.start(b.Node, nil, "/bin/sh", "-c", script)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	said := func(p *Process, what string) func() error {
		return func() error {
			if !strings.Contains(p.Log(), what) {
				return fmt.Errorf("it has not said %q", what)
			}
			return nil
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	orderly := start("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.1; done")
	if err := orderly.await(ctx, said(orderly, "ready")); err != nil {
		t.Fatal(err)
	}
	if err := orderly.Ended(); err != nil {
		t.Errorf("it runs, and Ended says %v", err)
	}
	if err := orderly.Stop(); err != nil || !strings.Contains(orderly.Log(), "bye") {
		t.Errorf("stop: %v, log %q", err, orderly.Log())
	}
	failing := start("echo wrong flag >&2; exit 2")
	if err := failing.await(ctx, said(failing, "never")); err == nil || !strings.Contains(err.Error(), "exit status 2: wrong flag") {
		t.Errorf("a process that fails: %v", err)
	}
	if err := failing.Stop(); err != nil {
		t.Errorf("stop of one that has ended: %v", err)
	}
}

func TestRequire(t *testing.T) {
	if err := Require("ip"); err != nil {
		t.Error(err)
	}
	t.Setenv("PATH", t.TempDir())
	err := Require("iptables-nft", "ip")
	if err == nil || !strings.Contains(err.Error(), "iptables-nft is missing (Debian package iptables)") || !strings.Contains(err.Error(), "iproute2") {
		t.Errorf("%v, want both named with their packages", err)
	}
}
