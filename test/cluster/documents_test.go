//go:build cluster

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

// block is one fenced block of a document.
type block struct {
	file, language, text string
	line                 int
	used                 bool
}

func (b *block) String() string { return fmt.Sprintf("%s:%d", b.file, b.line) }

// runElsewhere are commands that other jobs of continuous integration run.
var runElsewhere = []string{"make demo\n", "make test\n"}

// documents are the blocks of README.md and docs/, and where their commands run: in the node, in a
// copy of this repository or in a directory of the operator's, with stand-ins for Docker and
// systemd.
type documents struct {
	*node
	blocks              []*block
	checkout, directory string
	origin              string // a bare repository in place of the one on GitHub
}

// readDocuments extracts the blocks. Each is without its indentation.
func readDocuments(t *testing.T) []*block {
	t.Helper()
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	var all []*block
	for _, file := range append(files, "../../README.md", "../../CONTRIBUTING.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name, err := filepath.Rel("../..", file)
		if err != nil {
			t.Fatal(err)
		}
		var open *block
		indent := ""
		for i, line := range strings.Split(string(text), "\n") {
			fence := strings.Index(line, "```")
			switch {
			case open == nil && fence >= 0 && strings.TrimSpace(line[:fence]) == "":
				indent = line[:fence]
				open = &block{file: name, line: i + 1, language: line[fence+3:]}
			case open != nil && fence >= 0:
				all = append(all, open)
				open = nil
			case open != nil:
				open.text += strings.TrimPrefix(line, indent) + "\n"
			}
		}
		if open != nil {
			t.Fatalf("%s is not closed", open)
		}
	}
	return all
}

// find returns the one block of a file that contains the text.
func (d *documents) find(t *testing.T, file, contains string) *block {
	t.Helper()
	var found []*block
	for _, b := range d.blocks {
		if b.file == file && strings.Contains(b.text, contains) {
			found = append(found, b)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s has %d blocks with %q, want one", file, len(found), contains)
	}
	found[0].used = true
	return found[0]
}

// command returns the command that runs a block by bash, up to the first command that fails.
func (d *documents) command(t *testing.T, directory string, b *block) *exec.Cmd {
	t.Helper()
	if b.language != "sh" {
		t.Fatalf("%s is %q, want sh", b, b.language)
	}
	c := d.node.command(t.Context(), "env", "--chdir="+directory,
		"NODE_NAME="+nodeName, "HOST_INTERFACE=cni0", "HOST_IP="+nodeIP,
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=url.file://"+strings.TrimSuffix(d.origin, ".git")+".insteadOf",
		"GIT_CONFIG_VALUE_0=https://github.com/kube2iam-cni/kube2iam-cni",
		"bash", "-c", `PATH=$0:$PATH:$1; set -euo pipefail; eval "$2"`, filepath.Join(d.scripts, "operator"), os.Getenv("PATH"), b.text)
	c.WaitDelay = time.Second
	return c
}

func (d *documents) run(t *testing.T, directory, file, contains string) string {
	t.Helper()
	b := d.find(t, file, contains)
	out, err := d.command(t, directory, b).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s\n%s", b, err, b.text, out)
	}
	return string(out)
}

// save writes a manifest to the file that its first line names.
func (d *documents) save(t *testing.T, directory, file, name string) {
	t.Helper()
	b := d.find(t, file, "# "+name+"\n")
	if !strings.HasPrefix(b.text, "# "+name+"\n") || b.language != "yaml" {
		t.Fatalf("%s is not a manifest called %s", b, name)
	}
	if err := os.WriteFile(filepath.Join(directory, name), []byte(b.text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// testDocuments runs every command and applies every manifest of the documents, on a node without
// this product.
func testDocuments(t *testing.T, n *node, c *cloud) {
	d := &documents{node: n, blocks: readDocuments(t)}
	d.prepare(t)
	d.policies(t)

	// kube2iam's own rule, which leaves an empty chain behind.
	kube2iam := func(action string) {
		n.must(t, "iptables", "-t", "nat", action, "PREROUTING", "-i", "cni0", "-p", "tcp", "-d", metadataIP, "--dport", "80", "-j", "DNAT", "--to-destination", nodeIP+":8181")
	}
	kube2iam("-A")
	kube2iam("-D")
	bare := n.ruleset(t)
	const readme, install = "README.md", "docs/install.md"
	d.run(t, d.checkout, readme, "docker push")

	// With kustomize, beside kube2iam's rule, as the migration has it.
	kube2iam("-A")
	d.save(t, d.directory, install, "kustomization.yaml")
	d.run(t, d.directory, install, "kubectl apply --kustomize .")
	d.run(t, d.checkout, "docs/migration.md", "iptables -t nat -D")
	d.save(t, d.directory, readme, "my-app.yaml")
	if said := d.run(t, d.directory, readme, "deployment/my-app"); !strings.HasSuffix(strings.TrimSpace(said), "my-role") {
		t.Errorf("the pod's role is not its own: %s", said)
	}
	d.run(t, d.directory, install, "kubectl delete --kustomize .")
	d.removed(t, bare, d.run(t, d.checkout, install, "sed \"s/NODE/"))

	// With Helm.
	d.run(t, d.checkout, readme, "helm install")
	n.chained(t, podsConfig, "bridge", "portmap")
	d.run(t, d.checkout, install, "helm upgrade")
	n.rolledOut(t)
	d.removed(t, bare, d.run(t, d.checkout, install, "helm uninstall"))

	// With systemd.
	d.run(t, d.checkout, install, "kind: Secret")
	d.run(t, d.checkout, install, "systemctl enable")
	for _, program := range []string{"kube2iam-proxy", "kube2iam-agent"} {
		await(t, podLimit, program+" ready", func(ctx context.Context) error {
			_, err := n.output(ctx, nil, "/opt/kube2iam-cni/bin/"+program, "ready")
			return err
		})
	}
	n.chained(t, podsConfig, "bridge", "portmap")
	d.noUserData(t)
	n.must(t, "kubectl", "delete", "--filename="+filepath.Join(d.directory, "my-app.yaml"), "--wait")
	d.removed(t, bare, d.run(t, d.checkout, install, "systemctl disable"))
	d.removed(t, bare, d.run(t, d.checkout, install, "rm -r /opt/kube2iam-cni"))
	d.run(t, d.checkout, install, "kubectl delete --filename conf/kustomize/access.yaml")

	d.find(t, "docs/operations.md", "scrape_configs:") // for Prometheus, which the suite does not have
	for _, b := range d.blocks {
		if (b.language == "sh" || b.language == "yaml" || b.language == "json" || b.language == "ini") && !b.used && !slices.Contains(runElsewhere, b.text) {
			t.Errorf("%s was not run:\n%s", b, b.text)
		}
		if b.language == "" && commandLine.MatchString(b.text) {
			t.Errorf("%s looks like commands and is not marked as sh:\n%s", b, b.text)
		}
	}
	c.metadata.Reset() // pods were not guarded while nothing was installed
}

// noUserData checks that the running proxy gives the pod of my-app.yaml its role and no user data.
func (d *documents) noUserData(t *testing.T) {
	t.Helper()
	const service = "http://" + metadataIP + "/latest/"
	wget := func(ctx context.Context, path string) (string, error) {
		return d.output(ctx, nil, "kubectl", "exec", "deployment/my-app", "--", "wget", "-q", "-O", "-", service+path)
	}
	await(t, podLimit, "the pod's role", func(ctx context.Context) error {
		role, err := wget(ctx, "meta-data/iam/security-credentials/")
		if err == nil && role != "my-role" {
			err = fmt.Errorf("it is %q", role)
		}
		return err
	})
	if _, err := wget(t.Context(), "user-data"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("user data: %v, want 404", err)
	}
}

// commandLine matches the beginning of a command in a document.
var commandLine = regexp.MustCompile(`(?m)^(\$ )?(kubectl|helm|make|docker|scripts/|bin/|iptables|systemctl|sed) `)

// prepare makes what an operator has before the first command: the repository on GitHub, a checkout
// of it, and an empty directory.
func (d *documents) prepare(t *testing.T) {
	t.Helper()
	root := filepath.Join(d.state, "documents")
	d.checkout, d.directory, d.origin = filepath.Join(root, "checkout"), filepath.Join(root, "directory"), filepath.Join(root, "origin.git")
	if err := os.MkdirAll(d.directory, 0o755); err != nil {
		t.Fatal(err)
	}
	copied := exec.CommandContext(t.Context(), "bash", "-c", `set -euo pipefail
mkdir "$1"
git -C ../.. ls-files --cached --others --exclude-standard -z | tar -C ../.. --null --files-from=- --ignore-failed-read -cf - | tar -C "$1" -xf -
cd "$1"
git init -q -b main
git -c core.excludesFile=/dev/null add --force .
git -c user.name=suite -c user.email=suite@example.com commit -q -m suite
git tag v0.1.0 # which the documents name
git clone -q --bare . "$2"
ln -s "$2" "${2%.git}"`, "copy", d.checkout, d.origin)
	if out, err := copied.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d.must(t, "mkdir", "-p", "/etc/systemd/system")
}

// policies parses the IAM policies, which nothing here can apply.
func (d *documents) policies(t *testing.T) {
	for _, b := range d.blocks {
		if b.language != "json" {
			continue
		}
		b.used = true
		var policy struct {
			Version   string
			Statement []struct{ Effect, Action string }
		}
		if err := json.Unmarshal([]byte(b.text), &policy); err != nil || policy.Version != "2012-10-17" || len(policy.Statement) == 0 {
			t.Errorf("%s is no policy: %v", b, err)
		}
	}
}

// removed checks that an uninstallation left the node as it was. said is its output.
func (d *documents) removed(t *testing.T, bare, said string) {
	t.Helper()
	if diff := cmp.Diff(bare, d.ruleset(t)); diff != "" {
		t.Errorf("rules (-before install +after uninstall):\n%s\nit said %s", diff, said)
	}
	if networks, err := conflist.Chained(d.path(confDir), pluginType); err != nil || len(networks) > 0 {
		t.Errorf("chained in %q, %v; it said %s", networks, err, said)
	}
	if _, err := os.Stat(d.path(stateDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the state directory: %v; it said %s", err, said)
	}
}
