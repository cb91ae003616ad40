package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
)

// pluginList has the positions of the plugins in the text of a network configuration list. A change
// leaves all other bytes as they are, so a removal restores the text from before the insertion.
// (sjson does not restore it, and changes the first of two equal keys, where libcni uses the last.)
type pluginList struct {
	text    []byte
	start   int // the first byte after the bracket of "plugins"
	plugins []span
}

// span is the range of bytes [from, to).
type span struct{ from, to int }

// errNoPlugins is the error of a text without a list of plugins.
var errNoPlugins = errors.New(`no list "plugins"`)

func parseList(text []byte) (*pluginList, error) {
	if !json.Valid(text) {
		return nil, errors.New("not valid JSON")
	}
	// From here on the decoder cannot fail.
	l := &pluginList{text: text}
	d := json.NewDecoder(bytes.NewReader(text))
	if open, _ := d.Token(); open != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	for d.More() {
		if key, _ := d.Token(); key != "plugins" {
			nextValue(d)
			continue
		}
		if open, _ := d.Token(); open != json.Delim('[') {
			return nil, errNoPlugins
		}
		l.start, l.plugins = int(d.InputOffset()), nil
		for d.More() {
			l.plugins = append(l.plugins, nextValue(d))
		}
		d.Token() // the closing bracket
	}
	if l.start == 0 {
		return nil, errNoPlugins
	}
	return l, nil
}

func nextValue(d *json.Decoder) span {
	var value json.RawMessage
	d.Decode(&value)
	end := int(d.InputOffset())
	return span{end - len(value), end}
}

func (l *pluginList) plugin(i int) []byte { return l.text[l.plugins[i].from:l.plugins[i].to] }

// indexes returns the indexes of the plugins with a type.
func (l *pluginList) indexes(plugin string) []int {
	var indexes []int
	for i := range l.plugins {
		var entry struct{ Type string }
		if json.Unmarshal(l.plugin(i), &entry) == nil && entry.Type == plugin {
			indexes = append(indexes, i)
		}
	}
	return indexes
}

// insert returns the text with exactly one entry of the plugin. An equal entry after another plugin
// stays where it is. Any other is removed, and the new one becomes the last of the list.
func (l *pluginList) insert(plugin string, entry []byte) ([]byte, error) {
	indexes := l.indexes(plugin)
	if len(indexes) == 1 && indexes[0] > 0 && reflect.DeepEqual(decode(l.plugin(indexes[0])), decode(entry)) {
		return l.text, nil
	}
	l, err := l.remove(plugin)
	if err != nil {
		return nil, err
	}
	last, before := len(l.plugins)-1, l.start
	if last < 0 {
		return nil, errors.New("no plugin is in it that makes an interface")
	}
	// The new entry has the same white space before it as the last one.
	if last > 0 {
		end := l.plugins[last-1].to
		before = end + bytes.IndexByte(l.text[end:], ',') + 1
	}
	end := l.plugins[last].to
	space := l.text[before:l.plugins[last].from]
	return slices.Concat(l.text[:end], []byte(","), space, entry, l.text[end:]), nil
}

// remove returns the list without the entries of the plugin.
func (l *pluginList) remove(plugin string) (*pluginList, error) {
	indexes := l.indexes(plugin)
	if len(indexes) == 0 {
		return l, nil
	}
	i := indexes[len(indexes)-1]
	cut := l.plugins[i]
	if i > 0 {
		cut.from = l.plugins[i-1].to // with the comma before it
	} else if len(l.plugins) > 1 {
		cut.to = l.plugins[1].from
	}
	rest, err := parseList(slices.Concat(l.text[:cut.from], l.text[cut.to:]))
	if err != nil {
		return nil, err
	}
	return rest.remove(plugin)
}

// decode returns the value of a JSON text. Numbers keep all their digits.
func decode(text []byte) (value any) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	d.Decode(&value)
	return value
}
