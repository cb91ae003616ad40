package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/cnidirs"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// unit has the settings of conf/kube2iam-cni-agent.service.
type unit map[string]string

func readUnit(t *testing.T) unit {
	t.Helper()
	text, err := os.ReadFile("../../conf/kube2iam-cni-agent.service")
	if err != nil {
		t.Fatal(err)
	}
	u := make(unit)
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(key, "#") {
			if _, twice := u[key]; twice {
				t.Fatalf("%s is set twice", key)
			}
			u[key] = value
		}
	}
	return u
}

// command returns ExecStart as systemd splits it (systemd.service(5), "COMMAND LINES").
func (u unit) command() []string { return strings.Fields(u["ExecStart"]) }

// capabilities returns the unit's capabilities as a mask of the numbers in linux/capability.h.
func (u unit) capabilities(t *testing.T) (mask uint64) {
	t.Helper()
	numbers := map[string]int{
		"CAP_CHOWN": unix.CAP_CHOWN, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_NET_RAW": unix.CAP_NET_RAW,
		"CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN,
	}
	for _, name := range strings.Fields(u["CapabilityBoundingSet"]) {
		number, ok := numbers[name]
		if !ok {
			t.Fatalf("unknown capability %s", name)
		}
		mask |= 1 << number
	}
	return mask
}

// restrict takes all other capabilities from the programs that this thread starts, for good.
func (n *testNode) restrict(mask uint64) {
	n.Helper()
	for number := 0; ; number++ {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(number), 0, 0, 0); err != nil {
			break // the kernel has no more
		}
		if mask&(1<<number) == 0 {
			n.Must(unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(number), 0, 0, 0))
		}
	}
	n.Must(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
}

// listen listens on the socket of a container runtime, by which the agent finds the runtime.
func (n *testNode) listen(path string) {
	n.Helper()
	n.Must(os.MkdirAll(filepath.Dir(path), 0o755))
	l, err := net.Listen("unix", path)
	n.Must(err)
	n.Cleanup(func() { l.Close() })
}

// TestUnitInstalls runs the unit's command with the unit's capabilities, after `install`, on nodes
// of several distributions: each has its directories in a mount namespace.
func TestUnitInstalls(t *testing.T) {
	user := 1000 // the owner of the network configurations on some distributions
	if netnstest.InUserNamespace() {
		user = 0 // the namespace maps no other one
	}
	for distribution, tt := range map[string]struct {
		socket, config, text string
		bin, conf            string
		single               bool
	}{
		"defaults":        {bin: cnidirs.Default.BinDir, conf: cnidirs.Default.ConfDir},
		"a single plugin": {bin: cnidirs.Default.BinDir, conf: cnidirs.Default.ConfDir, single: true},
		"GKE": {
			"/run/containerd/containerd.sock", "/etc/containerd/config.toml", "[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/home/kubernetes/bin\"\n",
			"/home/kubernetes/bin", cnidirs.Default.ConfDir, false,
		},
		"k3s": {
			"/run/k3s/containerd/containerd.sock", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
			"[plugins.\"io.containerd.cri.v1.runtime\".cni]\nbin_dirs = [\"/var/lib/rancher/k3s/data/cni\"]\nconf_dir = \"/var/lib/rancher/k3s/agent/etc/cni/net.d\"\n",
			"/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d", false,
		},
		"microk8s": {
			"/var/snap/microk8s/common/run/containerd.sock", "/var/snap/microk8s/current/args/containerd.toml",
			"[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"${SNAP_DATA}/opt/cni/bin\"\nconf_dir = \"${SNAP_DATA}/args/cni-network\"\n",
			"/var/snap/microk8s/current/opt/cni/bin", "/var/snap/microk8s/current/args/cni-network", false,
		},
		"OpenShift": {
			"/run/crio/crio.sock", "/etc/crio/crio.conf", "[crio.network]\nnetwork_dir = \"/etc/cni/multus/net.d\"\nplugin_dirs = [\"/var/lib/cni/bin\"]\n",
			"/var/lib/cni/bin", "/etc/cni/multus/net.d", false,
		},
	} {
		t.Run(distribution, func(t *testing.T) {
			n := newNode(t, "nftables")
			u := readUnit(t)
			self, err := os.ReadFile("/proc/self/exe")
			n.Must(err)
			plugin, err := os.ReadFile(n.plugin)
			n.Must(err)
			n.Must(unix.Unshare(unix.CLONE_NEWNS))
			n.Must(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
			for _, dir := range []string{"/etc", "/home", "/opt", "/run", "/var"} {
				n.Must(unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"))
			}
			programs := filepath.Dir(u.command()[0])
			n.Must(os.MkdirAll(programs, 0o755))
			n.Must(os.WriteFile(filepath.Join(programs, "kube2iam-agent"), self, 0o755))
			n.Must(os.WriteFile(filepath.Join(programs, pluginName), plugin, 0o755))
			n.bin, n.conf = tt.bin, tt.conf
			for _, dir := range []string{n.bin, n.conf} {
				n.Must(os.MkdirAll(dir, 0o755))
			}
			if tt.socket != "" {
				n.listen(tt.socket)
				n.Must(os.MkdirAll(filepath.Dir(tt.config), 0o755))
				n.Must(os.WriteFile(tt.config, []byte(tt.text), 0o644))
			}
			path, chained := filepath.Join(n.conf, "10-pods.conflist"), filepath.Join(n.conf, "10-pods.conflist")
			text := primary
			if tt.single {
				path, chained = filepath.Join(n.conf, "10-pods.conf"), filepath.Join(n.conf, "10-pods-conf-kube2iam-cni.conflist")
				text = `{"cniVersion": "1.0.0", "name": "pods", "type": "ptp"}`
			}
			write := func() {
				t.Helper()
				n.Must(os.WriteFile(path, []byte(text), 0o640))
				n.Must(os.Chown(path, user, user))
			}
			write()
			if got := outcomeOf(t, exec.Command(u.command()[0], "install"), append(n.env, agentEnv(t)...), nil); got.Code != 0 || !strings.Contains(got.Stdout, "program "+n.bin+"/"+pluginName) {
				t.Fatalf("install: %+v", got)
			}
			if tt.single {
				n.Must(os.Remove(chained))
			}
			write() // as the primary CNI does at a boot

			n.restrict(u.capabilities(t))
			notified, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: "/run/notify"})
			n.Must(err)
			defer notified.Close()
			command := u.command()
			agent := &agentProcess{t: t, ended: make(chan struct{})}
			agent.cmd = exec.Command(command[0], append(command[1:], "--interval=1s")...)
			agent.cmd.Stdout, agent.cmd.Stderr = agent, agent
			agent.cmd.Env = append(agentEnv(t), "PATH="+os.Getenv("PATH"), "NOTIFY_SOCKET=/run/notify")
			n.launch(agent)
			n.Must(notified.SetReadDeadline(time.Now().Add(time.Minute)))
			message := make([]byte, 4096)
			size, err := notified.Read(message)
			if err != nil || !strings.HasPrefix(string(message[:size]), "READY=1") {
				t.Fatalf("the notification is %q, %v", message[:size], err)
			}
			n.eventuallyReady()
			if got, want := effectiveCapabilities(t, agent.cmd.Process.Pid), u.capabilities(t); got != want {
				t.Errorf("capabilities %#x, want %#x", got, want)
			}
			checkOwner := func(when string) {
				t.Helper()
				var st unix.Stat_t
				n.Must(unix.Stat(chained, &st))
				if int(st.Uid) != user || int(st.Gid) != user || st.Mode&0o777 != 0o640 {
					t.Errorf("%s: %s has the owner %d:%d and mode %#o", when, chained, st.Uid, st.Gid, st.Mode&0o777)
				}
			}
			checkOwner("chained")
			// The unit's capabilities suffice to repair the installation.
			n.Must(os.Remove(filepath.Join(n.bin, pluginName)))
			n.eventually("the binary again", func() bool { _, err := os.Stat(filepath.Join(n.bin, pluginName)); return err == nil })
			text = strings.Replace(text, "pods", "pods2", 1)
			write()
			n.eventually("chained again", func() bool {
				now, _ := os.ReadFile(chained)
				return strings.Contains(string(now), "pods2") && strings.Contains(string(now), pluginName)
			})
			checkOwner("chained again")
			n.In(n.Netns, func() { // on a thread with all capabilities, like a container runtime
				if got := n.cni("ADD", n.Args("c1", n.Pod, testhost.Pod4)); got.Code != 0 {
					t.Errorf("ADD: %+v", got)
				}
			})
			n.Run("nft flush ruleset")
			n.eventually("guarded again", func() bool { return strings.Contains(n.Rules(), "guard") })
			if distribution == "k3s" { // its upgrades can change the directories
				n.Must(os.WriteFile(tt.config, []byte(strings.ReplaceAll(tt.text, "/data/", "/other/")), 0o644))
				<-agent.ended
				if code := agent.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(agent.output(), "/var/lib/rancher/k3s/other/cni: exiting") {
					t.Errorf("after a change of the directories: status %d, log %s", code, agent.output())
				}
				return
			}
			if code := agent.end(syscall.SIGTERM); code != 0 {
				t.Errorf("the agent ends with %d", code)
			}
		})
	}
}

// effectiveCapabilities returns those of a process (proc(5), CapEff).
func effectiveCapabilities(t *testing.T, pid int) (mask uint64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			if _, err := fmt.Sscanf(strings.TrimSpace(value), "%x", &mask); err != nil {
				t.Fatal(err)
			}
		}
	}
	return mask
}

// TestUnitStartsBeforeDocumentedKubelets compares the unit with the table "Kubelet units" of the
// documentation.
func TestUnitStartsBeforeDocumentedKubelets(t *testing.T) {
	text, err := os.ReadFile("../../docs/install.md")
	if err != nil {
		t.Fatal(err)
	}
	u := readUnit(t)
	_, table, _ := strings.Cut(string(text), "\n### Kubelet units\n")
	_, table, _ = strings.Cut(strings.TrimSpace(table), "\n\n")
	table, _, _ = strings.Cut(table, "\n\n")
	quoted := func(cell string) (values []string) {
		for i, part := range strings.Split(cell, "`") {
			if i%2 == 1 {
				values = append(values, part)
			}
		}
		return values
	}
	rows := strings.Split(table, "\n")[2:]
	for _, row := range rows {
		cells := strings.Split(row, "|")
		if len(cells) != 4 {
			t.Fatalf("%d columns in %q", len(cells)-2, row)
		}
		units := quoted(cells[2])
		if len(units) == 0 {
			t.Errorf("no unit in %q", row)
		}
		for _, kubelet := range units {
			if !slices.Contains(strings.Fields(u["Before"]), kubelet) {
				t.Errorf("the unit starts before %[2]q, without %[1]s", kubelet, u["Before"])
			}
		}
	}
	if len(rows) < 4 {
		t.Errorf("%d rows", len(rows))
	}
}
