package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
)

// span is a part of a text, by its offsets.
type span struct{ from, to int }

// pluginList is a list of plugins as it stands in the text of a configuration list. The text around a change stays as it is, byte for
// byte: whoever wrote the file finds their own again, and unchaining gives back what was there.
type pluginList struct {
	text    []byte
	inside  span   // the array, without its brackets
	plugins []span // its elements
}

// errNoPlugins is the error of a text without a list of plugins.
var errNoPlugins = errors.New(`no list "plugins"`)

// parseList finds the list of plugins in a configuration list (CNI specification, section 1). Where a key stands twice the last
// counts, as it does to libcni.
func parseList(text []byte) (*pluginList, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	open, err := d.Token()
	if err != nil {
		return nil, err
	}
	if open != json.Delim('{') {
		return nil, errors.New("no JSON object")
	}
	var c *pluginList
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, err
		}
		if key != "plugins" {
			var other json.RawMessage
			if err := d.Decode(&other); err != nil {
				return nil, err
			}
			continue
		}
		if c, err = readPlugins(d, text); err != nil {
			return nil, err
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("text behind the JSON object")
	}
	if c == nil {
		return nil, errNoPlugins
	}
	return c, nil
}

func readPlugins(d *json.Decoder, text []byte) (*pluginList, error) {
	open, err := d.Token()
	if err != nil {
		return nil, err
	}
	if open != json.Delim('[') {
		return nil, errNoPlugins
	}
	c := &pluginList{text: text, inside: span{from: int(d.InputOffset())}}
	for d.More() {
		var plugin json.RawMessage
		if err := d.Decode(&plugin); err != nil {
			return nil, err
		}
		end := int(d.InputOffset())
		c.plugins = append(c.plugins, span{end - len(plugin), end})
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	c.inside.to = int(d.InputOffset()) - 1
	return c, nil
}

func (c *pluginList) plugin(i int) []byte { return c.text[c.plugins[i].from:c.plugins[i].to] }

// of are the places of the plugins of a type.
func (c *pluginList) of(plugin string) []int {
	var places []int
	for i := range c.plugins {
		var e entry
		if json.Unmarshal(c.plugin(i), &e) == nil && e.Type == plugin {
			places = append(places, i)
		}
	}
	return places
}

// with is the text with this entry once among the plugins: where one of its type stands behind another plugin, in its place, else at
// the end. It is the same text where it says so already, in whatever words.
func (c *pluginList) with(plugin string, own []byte) ([]byte, error) {
	places := c.of(plugin)
	if len(c.plugins) == len(places) {
		return nil, errors.New("no plugin is in it that makes an interface")
	}
	if len(places) == 1 && places[0] > 0 {
		if at := places[0]; !same(c.plugin(at), own) {
			return splice(c.text, c.plugins[at], own), nil
		}
		return c.text, nil
	}
	if len(places) > 0 {
		text, err := c.without(plugin)
		if err != nil {
			return nil, err
		}
		again, err := parseList(text)
		if err != nil {
			return nil, err
		}
		return again.with(plugin, own)
	}
	last := len(c.plugins) - 1
	before := c.inside.from
	if last > 0 {
		before = c.plugins[last-1].to + bytes.IndexByte(c.text[c.plugins[last-1].to:], ',') + 1
	}
	space := c.text[before:c.plugins[last].from]
	end := c.plugins[last].to
	return splice(c.text, span{end, end}, slices.Concat([]byte(","), space, own)), nil
}

// without is the text without the plugins of a type.
func (c *pluginList) without(plugin string) ([]byte, error) {
	places := c.of(plugin)
	if len(places) == 0 {
		return c.text, nil
	}
	at := places[len(places)-1]
	cut := c.plugins[at]
	switch {
	case at > 0: // with the comma before it
		cut.from = c.plugins[at-1].to
	case len(c.plugins) > 1:
		cut.to = c.plugins[1].from
	}
	rest, err := parseList(splice(c.text, cut, nil))
	if err != nil {
		return nil, err
	}
	return rest.without(plugin)
}

func splice(text []byte, at span, with []byte) []byte {
	return slices.Concat(text[:at.from], with, text[at.to:])
}

// same tells whether two JSON texts mean the same.
func same(a, b []byte) bool {
	x, errX := meaning(a)
	y, errY := meaning(b)
	return errX == nil && errY == nil && reflect.DeepEqual(x, y)
}

func meaning(text []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	err = d.Decode(&v)
	return v, err
}

// listOf is a configuration list of one plugin's own configuration, as libcni makes one of it (libcni/conf.go, ConfListFromConf), and
// the entry.
func listOf(conf, own []byte) ([]byte, error) {
	var head struct {
		Version json.RawMessage `json:"cniVersion,omitempty"`
		Name    string          `json:"name"`
	}
	if err := json.Unmarshal(conf, &head); err != nil {
		return nil, err
	}
	if head.Name == "" {
		return nil, errors.New("the network has no name")
	}
	name, err := json.Marshal(head.Name)
	if err != nil {
		return nil, err
	}
	version := ""
	if head.Version != nil {
		version = fmt.Sprintf("  \"cniVersion\": %s,\n", head.Version)
	}
	return fmt.Appendf(nil, "{\n%s  \"name\": %s,\n  \"plugins\": [\n    %s,\n    %s\n  ]\n}\n", version, name, bytes.TrimSpace(conf), own), nil
}
