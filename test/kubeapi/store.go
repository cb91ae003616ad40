package kubeapi

import (
	"maps"
	"slices"
	"strconv"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/uuid"
)

type object interface {
	metav1.Object
	runtime.Object
}

// event is a change. Without an object before it is a creation, without one after it a deletion.
type event struct {
	version       uint64
	resource      string
	before, after object
}

// store has the objects by resource and "namespace/name", and the history of their changes. Stored
// objects are replaced, never changed, so it returns them without a copy.
type store struct {
	mu      sync.Mutex
	version uint64
	// forgotten is the version up to which the history is removed.
	forgotten uint64
	objects   map[string]map[string]object
	events    []event

	changed broadcast
}

func newStore() *store {
	return &store{version: 1, objects: map[string]map[string]object{pods: {}, namespaces: {}}}
}

func key(namespace, name string) string { return namespace + "/" + name }

// put creates or replaces the object, which then belongs to the store. It sets what the API server
// sets: UID, creation time and version.
func (s *store) put(resource string, obj object) object {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.putLocked(resource, obj)
}

func (s *store) putLocked(resource string, obj object) object {
	k := key(obj.GetNamespace(), obj.GetName())
	before := s.objects[resource][k]
	if obj.GetUID() == "" {
		obj.SetUID(uuid.NewUUID())
	}
	if created := obj.GetCreationTimestamp(); created.IsZero() {
		obj.SetCreationTimestamp(metav1.Now().Rfc3339Copy())
	}
	if before != nil && before.GetUID() != obj.GetUID() {
		// It is another object of the same name: watchers must see the deletion of the first.
		s.removeLocked(resource, k)
		before = nil
	}
	s.record(event{resource: resource, before: before, after: obj})
	obj.SetResourceVersion(strconv.FormatUint(s.version, 10))
	s.objects[resource][k] = obj
	return obj
}

// update replaces the object by a changed copy. It returns nil if there is no such object.
func (s *store) update(resource, namespace, name string, change func(object)) object {
	s.mu.Lock()
	defer s.mu.Unlock()
	obj, ok := s.objects[resource][key(namespace, name)]
	if !ok {
		return nil
	}
	obj = obj.DeepCopyObject().(object)
	change(obj)
	return s.putLocked(resource, obj)
}

// remove reports whether there was such an object.
func (s *store) remove(resource, namespace, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.removeLocked(resource, key(namespace, name))
}

func (s *store) removeLocked(resource, key string) bool {
	obj, ok := s.objects[resource][key]
	if !ok {
		return false
	}
	s.record(event{resource: resource, before: obj})
	delete(s.objects[resource], key)
	return true
}

func (s *store) record(e event) {
	s.version++
	e.version = s.version
	s.events = append(s.events, e)
	s.changed.fire()
}

func (s *store) get(resource, namespace, name string) (object, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	obj, ok := s.objects[resource][key(namespace, name)]
	return obj, ok
}

// list returns the resource's objects in the order of their keys, and the version of that state.
func (s *store) list(resource string) ([]object, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var objects []object
	for _, k := range slices.Sorted(maps.Keys(s.objects[resource])) {
		objects = append(objects, s.objects[resource][k])
	}
	return objects, s.version
}

// since returns the resource's changes after version, and the version up to which they are
// complete. It fails with a 410 Status if some of them are removed.
func (s *store) since(resource string, version uint64) ([]event, uint64, *apierrors.StatusError) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if version < s.forgotten {
		return nil, 0, tooOld(version, s.forgotten)
	}
	var events []event
	for _, e := range s.events {
		if e.version > version && e.resource == resource {
			events = append(events, e)
		}
	}
	return events, s.version, nil
}

// forget removes the history so far, as compaction does. Watches from earlier versions fail.
func (s *store) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgotten, s.events = s.version, nil
}

// broadcast wakes all waiting goroutines each time it is fired.
type broadcast struct {
	mu sync.Mutex
	c  chan struct{}
}

// next returns a channel that is closed when the broadcast fires next.
func (b *broadcast) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c == nil {
		b.c = make(chan struct{})
	}
	return b.c
}

func (b *broadcast) fire() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c != nil {
		close(b.c)
		b.c = nil
	}
}
