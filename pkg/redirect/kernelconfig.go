package redirect

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// explain adds to the error of a transaction the options of the kernel's configuration that the
// tables need and it lacks. The kernel itself only says that there is no such file.
func (k *nft) explain(tables []table, err error) error {
	if lacking := k.lacking(tables); len(lacking) > 0 {
		return fmt.Errorf("%w (the kernel lacks %s)", err, strings.Join(lacking, ", "))
	}
	return err
}

// lacking returns the options of the kernel's configuration that the tables need and the kernel
// lacks.
func (k *nft) lacking(tables []table) []string {
	var options []string
	for _, t := range tables {
		lacks := func(option string, c *nftables.Chain, rule ...expr.Any) bool {
			if !errors.Is(k.try(t.Family, c, rule), ErrUnsupported) {
				return false
			}
			if !slices.Contains(options, option) {
				options = append(options, option)
			}
			return true
		}
		family := map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "IPV4", nftables.TableFamilyIPv6: "IPV6", nftables.TableFamilyBridge: "BRIDGE"}[t.Family]
		if lacks("CONFIG_NF_TABLES_"+family, nil) {
			continue
		}
		for _, c := range t.chains {
			if c.Type == nftables.ChainTypeNAT && lacks("CONFIG_NFT_NAT", c.Chain) {
				continue
			}
			for _, r := range c.rules {
				for _, e := range r.exprs {
					switch e.(type) {
					case *expr.NAT:
						lacks("CONFIG_NFT_NAT", c.Chain, e)
					case *expr.Reject:
						lacks("CONFIG_NFT_REJECT", c.Chain, e)
					case *expr.Fib:
						lacks("CONFIG_NFT_FIB_"+family, c.Chain, e)
					}
				}
			}
		}
	}
	return options
}

// try makes a table, in it a chain like c if that is not nil, and in it a rule, and deletes the
// table in the same transaction. Another error than ErrUnsupported says that the kernel knows them.
func (k *nft) try(family nftables.TableFamily, c *nftables.Chain, rule []expr.Any) error {
	conn, err := k.open()
	if err != nil {
		return err
	}
	t := conn.AddTable(&nftables.Table{Name: fmt.Sprint(probePrefix, os.Getpid()), Family: family})
	if c != nil {
		like := *c
		like.Table = t
		conn.AddChain(&like)
		if len(rule) > 0 {
			conn.AddRule(&nftables.Rule{Table: t, Chain: &like, Exprs: rule})
		}
	}
	conn.DelTable(t)
	return supported(conn.Flush())
}
