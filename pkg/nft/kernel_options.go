package nft

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// addMissingOptions adds the options of the kernel's configuration that tables need and the kernel
// lacks to an error of a transaction. The kernel itself answers only "no such file".
func (c *Conn) addMissingOptions(err error, tables []Table) error {
	if options := c.missingOptions(tables); len(options) > 0 {
		return fmt.Errorf("%w (the kernel lacks %s)", err, strings.Join(options, ", "))
	}
	return err
}

func (c *Conn) missingOptions(tables []Table) []string {
	var options []string
	for _, t := range tables {
		isMissing := func(option string, chain *nftables.Chain, rule ...expr.Any) bool {
			if !errors.Is(c.try(t.Family, chain, rule), ErrUnsupported) {
				return false
			}
			if !slices.Contains(options, option) {
				options = append(options, option)
			}
			return true
		}
		family := map[string]string{"ip": "IPV4", "ip6": "IPV6", "bridge": "BRIDGE"}[familyName(t.Family)]
		if isMissing("CONFIG_NF_TABLES_"+family, nil) {
			continue
		}
		for _, chain := range t.Chains {
			if chain.Type == nftables.ChainTypeNAT && isMissing("CONFIG_NFT_NAT", chain.Chain) {
				continue
			}
			for _, r := range chain.Rules {
				for _, e := range r.Exprs {
					switch e.(type) {
					case *expr.NAT:
						isMissing("CONFIG_NFT_NAT", chain.Chain, e)
					case *expr.Reject:
						isMissing("CONFIG_NFT_REJECT", chain.Chain, e)
					case *expr.Fib:
						isMissing("CONFIG_NFT_FIB_"+family, chain.Chain, e)
					}
				}
			}
		}
	}
	return options
}

// ProbePrefix begins the names of tables that exist for the duration of a probe. A process that is
// killed during a probe leaves one behind; DeleteTables removes it.
const ProbePrefix = "kube2iam-cni-probe-"

// try makes a table, a chain like the given one and a rule, and deletes the table in the same
// transaction. It returns ErrUnsupported if the kernel lacks one of them.
func (c *Conn) try(family nftables.TableFamily, chain *nftables.Chain, rule []expr.Any) error {
	t := c.conn.AddTable(&nftables.Table{Name: fmt.Sprint(ProbePrefix, os.Getpid()), Family: family})
	if chain != nil {
		copied := *chain
		copied.Table = t
		c.conn.AddChain(&copied)
		if len(rule) > 0 {
			c.conn.AddRule(&nftables.Rule{Table: t, Chain: &copied, Exprs: rule})
		}
	}
	c.conn.DelTable(t)
	return WrapError(c.conn.Flush())
}
