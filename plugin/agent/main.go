// Command kube2iam-agent installs the CNI plugin kube2iam-cni on a node, and maintains its rules,
// its records and its entry in the network configuration.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// The build sets these by -ldflags "-X main.version=…".
var (
	version = "unknown"
	commit  = "unknown"
	date    = "unknown"
)

// pluginName is the file name of the plugin's binary and the type of its entry.
const pluginName = "kube2iam-cni"

func main() { os.Exit(run(os.Args)) }

func run(args []string) int {
	if err := program().Run(args); err != nil {
		fmt.Fprintf(os.Stderr, "kube2iam-agent: %v\n", err)
		return 1
	}
	return 0
}

func program() *cli.App {
	cli.VersionPrinter = func(c *cli.Context) {
		fmt.Fprintf(c.App.Writer, "kube2iam-agent %s (commit %s, built %s)\n", version, commit, date)
	}
	return &cli.App{
		Name:            "kube2iam-agent",
		Usage:           "installs the CNI plugin kube2iam-cni on a node and maintains it",
		UsageText:       "kube2iam-agent run|install|uninstall|ready [options]",
		Description:     description(),
		Version:         version,
		HideHelpCommand: true,
		Commands:        []*cli.Command{runCommand(os.Stderr), installCommand(os.Stdout, os.Stderr), uninstallCommand(os.Stdout, os.Stderr), readyCommand(os.Stdout)},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("unknown command %q; see kube2iam-agent --help", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
}

// description returns the text of --help, with the keys of the entry.
func description() string {
	var keys strings.Builder
	for _, k := range netconf.Keys {
		value, _ := json.Marshal(k.Default) // a string, an int or a bool
		fmt.Fprintf(&keys, "  %-33s %s\n", fmt.Sprintf("%q: %s", k.Name, value), k.Usage)
	}
	return `"kube2iam-agent install" puts the plugin into the runtime's plugin directory (/opt/cni/bin), and only then
appends an entry to the plugins of the node's network configuration list (/etc/cni/net.d), after the
plugin that makes the pod's interface:

{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "ipMasq": true,
      "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.244.0.0/24" }]],
                "routes": [{ "dst": "0.0.0.0/0" }] }
    },
    {
      "type": "kube2iam-cni"
    }
  ]
}

Keys of the entry, with their defaults; any other key is refused:

` + keys.String()
}
