package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// state is what the kernel has of a desired ruleset and of the caller's elements. All tables of a
// ruleset have one name.
type state struct {
	dormant  map[nftables.TableFamily]bool // the table's chains see no packets
	chains   map[string]chainState         // by chainID
	elements map[string]Element            // by Element.id
}

type chainState struct {
	hook  string
	rules []string
}

func chainID(c *nftables.Chain) string {
	return fmt.Sprintf("%d %s %s", c.Table.Family, c.Table.Name, c.Name)
}

// hook describes where the kernel calls a base chain, and what it does with packets that no rule
// decides.
func hook(c *nftables.Chain) string {
	if c.Hooknum == nil || c.Priority == nil || c.Policy == nil {
		return ""
	}
	return fmt.Sprint(c.Type, " ", *c.Hooknum, " ", *c.Priority, " ", *c.Policy)
}

// read returns the kernel's state: the tables' chains, and the elements that readElements adds. It
// tries again after an error that a concurrent change can cause, for example of a chain that is
// deleted between two requests.
func (c *Conn) read(ctx context.Context, tables []Table, readElements func(*state) error) (s *state, err error) {
	for range c.attempts {
		if err := c.setDeadline(ctx); err != nil {
			return nil, err
		}
		s = &state{dormant: make(map[nftables.TableFamily]bool), chains: make(map[string]chainState), elements: make(map[string]Element)}
		if err = c.readTables(s, tables); err == nil {
			err = readElements(s)
		}
		if err != nil && !c.deadline.IsZero() && !time.Now().Before(c.deadline) {
			// The library does not wrap the socket's error.
			return nil, fmt.Errorf("%w: %w", os.ErrDeadlineExceeded, err)
		}
		if err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, ErrUnsupported) {
			break
		}
	}
	return s, wrapReadError(err)
}

// readTables reads the desired chains of the tables that exist.
func (c *Conn) readTables(s *state, tables []Table) error {
	exists := make(map[nftables.TableFamily]bool)
	for _, t := range tables {
		if _, isRead := exists[t.Family]; !isRead {
			table, err := c.conn.ListTableOfFamily(t.Name, t.Family)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EAFNOSUPPORT) {
				return err
			}
			exists[t.Family] = err == nil && table != nil
			// The flag that marks a table dormant is the only one that these tables can get.
			s.dormant[t.Family] = exists[t.Family] && table.Flags != 0
		}
		if !exists[t.Family] {
			continue
		}
		for _, chain := range t.Chains {
			if err := c.readChain(s, chain); err != nil {
				return err
			}
		}
	}
	return nil
}

// readChain reads a chain by its name: other programs may have thousands.
func (c *Conn) readChain(s *state, desired Chain) error {
	rules, err := c.conn.GetRules(desired.Table, desired.Chain)
	if err != nil {
		return err
	}
	found, err := c.conn.ListChain(desired.Table, desired.Name)
	if err != nil && len(rules) == 0 {
		return nil // the chain does not exist: the library hides the kind of the error
	}
	if err != nil {
		return err
	}
	state := chainState{hook: hook(found)}
	for _, r := range rules {
		comment, _ := userdata.GetString(r.UserData, userdata.TypeComment)
		state.rules = append(state.rules, Rule{comment, r.Exprs}.text(desired.Table.Family))
	}
	s.chains[chainID(desired.Chain)] = state
	return nil
}

// readAllElements reads all elements of the tables of a name.
func (c *Conn) readAllElements(ctx context.Context, s *state, name string) error {
	tables, err := c.tables(ctx)
	if err != nil {
		return err
	}
	for _, t := range tables {
		if t.Name != name {
			continue
		}
		sets, err := c.conn.GetSets(t)
		if err != nil {
			return err
		}
		for _, set := range sets {
			elements, err := c.conn.GetSetElements(set)
			if err != nil {
				return err
			}
			for _, e := range elements {
				element := Element{Set: set, Key: e.Key, Value: e.Val, Owner: e.Comment}
				s.elements[element.id()] = element
			}
		}
	}
	return nil
}

// nfgenmsg is the size of the header before the attributes (linux/netfilter/nfnetlink.h).
const nfgenmsg = 4

// readElement reads the element at the key of e, if the kernel has one. The library can only dump
// whole sets. Linux answers a request for one element since 4.17 (nf_tables_getsetelem).
func (c *Conn) readElement(s *state, e Element) error {
	request := netlink.NewAttributeEncoder()
	request.ByteOrder = binary.BigEndian
	request.String(unix.NFTA_SET_ELEM_LIST_TABLE, e.Set.Table.Name)
	request.String(unix.NFTA_SET_ELEM_LIST_SET, e.Set.Name)
	request.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(list *netlink.AttributeEncoder) error {
		list.Nested(unix.NFTA_LIST_ELEM, func(element *netlink.AttributeEncoder) error {
			element.Nested(unix.NFTA_SET_ELEM_KEY, func(key *netlink.AttributeEncoder) error {
				key.Bytes(unix.NFTA_DATA_VALUE, e.Key)
				return nil
			})
			return nil
		})
		return nil
	})
	attributes, err := request.Encode()
	if err != nil {
		return err
	}
	messages, err := c.socket.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETSETELEM, Flags: netlink.Request},
		Data:   append([]byte{byte(e.Set.Table.Family), unix.NFNETLINK_V0, 0, 0}, attributes...),
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", e, err)
	}
	for _, m := range messages {
		if m.Header.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWSETELEM || len(m.Data) < nfgenmsg {
			continue
		}
		found := Element{Set: e.Set, Key: e.Key}
		if err := found.decode(m.Data[nfgenmsg:]); err != nil {
			return fmt.Errorf("%s: %w", e, err)
		}
		s.elements[e.id()] = found
	}
	return nil
}

// decode reads the value and the owner from the attributes of a message with one element.
func (e *Element) decode(attributes []byte) error {
	message, err := netlink.NewAttributeDecoder(attributes)
	if err != nil {
		return err
	}
	for message.Next() {
		if message.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		message.Nested(func(list *netlink.AttributeDecoder) error {
			for list.Next() {
				list.Nested(e.decodeElement)
			}
			return list.Err()
		})
	}
	return message.Err()
}

func (e *Element) decodeElement(element *netlink.AttributeDecoder) error {
	for element.Next() {
		switch element.Type() {
		case unix.NFTA_SET_ELEM_DATA:
			element.Nested(func(data *netlink.AttributeDecoder) error {
				for data.Next() {
					if data.Type() == unix.NFTA_DATA_VALUE {
						e.Value = data.Bytes()
					}
				}
				return data.Err()
			})
		case unix.NFTA_SET_ELEM_USERDATA:
			e.Owner, _ = userdata.GetString(element.Bytes(), userdata.NFTNL_UDATA_SET_ELEM_COMMENT)
		}
	}
	return element.Err()
}

// HasChain reports whether a chain exists, of whichever program.
func (c *Conn) HasChain(family nftables.TableFamily, table, chain string) bool {
	found, err := c.conn.ListChain(&nftables.Table{Name: table, Family: family}, chain)
	return err == nil && found != nil
}
