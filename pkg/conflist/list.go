package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
)

// pluginList has the positions of the plugins in the text of a network configuration list. A change
// leaves all other bytes as they are, so a removal restores the text from before the insertion. (sjson
// does not restore it, and changes the first of two equal keys, where libcni uses the last.)
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
	// From here on the decoders cannot fail.
	l := &pluginList{text: text}
	object := json.NewDecoder(bytes.NewReader(text))
	if open, _ := object.Token(); open != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	for object.More() {
		key, _ := object.Token()
		value := nextValue(object)
		if key != "plugins" {
			continue
		}
		if text[value.from] != '[' {
			return nil, errNoPlugins
		}
		l.start, l.plugins = value.from+1, nil
		array := json.NewDecoder(bytes.NewReader(text[value.from:value.to]))
		array.Token() // the bracket
		for array.More() {
			plugin := nextValue(array)
			l.plugins = append(l.plugins, span{value.from + plugin.from, value.from + plugin.to})
		}
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

// insert returns the text with exactly one entry of the plugin. The entry replaces one that comes
// after another plugin, and is otherwise the last in the list. insert returns the same text if it has
// an equal entry.
func (l *pluginList) insert(plugin string, entry []byte) ([]byte, error) {
	indexes := l.indexes(plugin)
	switch {
	case len(indexes) == len(l.plugins):
		return nil, errors.New("no plugin is in it that makes an interface")
	case len(indexes) == 1 && indexes[0] > 0:
		if equalJSON(l.plugin(indexes[0]), entry) {
			return l.text, nil
		}
		return splice(l.text, l.plugins[indexes[0]], entry), nil
	case len(indexes) > 0:
		rest, err := l.removeAll(plugin)
		if err != nil {
			return nil, err
		}
		return rest.insert(plugin, entry)
	}
	// The new entry has the same white space before it as the last one.
	last, before := len(l.plugins)-1, l.start
	if last > 0 {
		end := l.plugins[last-1].to
		before = end + bytes.IndexByte(l.text[end:], ',') + 1
	}
	end := l.plugins[last].to
	space := l.text[before:l.plugins[last].from]
	return splice(l.text, span{end, end}, slices.Concat([]byte(","), space, entry)), nil
}

// remove returns the text without the entries of the plugin.
func (l *pluginList) remove(plugin string) ([]byte, error) {
	rest, err := l.removeAll(plugin)
	if err != nil {
		return nil, err
	}
	return rest.text, nil
}

func (l *pluginList) removeAll(plugin string) (*pluginList, error) {
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
	rest, err := parseList(splice(l.text, cut, nil))
	if err != nil {
		return nil, err
	}
	return rest.removeAll(plugin)
}

func splice(text []byte, at span, with []byte) []byte {
	return slices.Concat(text[:at.from], with, text[at.to:])
}

func equalJSON(a, b []byte) bool {
	x, errX := decodeJSON(a)
	y, errY := decodeJSON(b)
	return errX == nil && errY == nil && reflect.DeepEqual(x, y)
}

func decodeJSON(text []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	err = d.Decode(&v)
	return v, err
}
