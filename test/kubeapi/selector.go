package kubeapi

import (
	"fmt"
	"net/url"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
)

// fieldsOf returns the fields that a fieldSelector can select by: for pods those of the API server
// (registry/core/pod, ToSelectableFields) without rarer ones.
func fieldsOf(obj object) fields.Set {
	set := fields.Set{"metadata.name": obj.GetName(), "metadata.namespace": obj.GetNamespace()}
	switch o := obj.(type) {
	case *corev1.Pod:
		set["spec.nodeName"] = o.Spec.NodeName
		set["spec.serviceAccountName"] = o.Spec.ServiceAccountName
		set["status.phase"] = string(o.Status.Phase)
		set["status.podIP"] = o.Status.PodIP
	case *corev1.Namespace:
		set["status.phase"] = string(o.Status.Phase)
		delete(set, "metadata.namespace")
	}
	return set
}

// selector describes the objects of a resource that a request selects.
type selector struct {
	namespace string // empty for all
	fields    fields.Selector
	labels    labels.Selector
}

// selectorOf reads a request's selectors. An unknown field is a 400 Status, as with the API server.
func selectorOf(resource, namespace string, q url.Values) (selector, *apierrors.StatusError) {
	sel := selector{namespace: namespace}
	var err error
	if sel.fields, err = fields.ParseSelector(q.Get("fieldSelector")); err != nil {
		return sel, apierrors.NewBadRequest(err.Error())
	}
	if sel.labels, err = labels.Parse(q.Get("labelSelector")); err != nil {
		return sel, apierrors.NewBadRequest(err.Error())
	}
	known := fieldsOf(newObject(resource))
	for _, r := range sel.fields.Requirements() {
		if _, ok := known[r.Field]; !ok {
			return sel, apierrors.NewBadRequest(fmt.Sprintf("field label not supported: %s", r.Field))
		}
	}
	return sel, nil
}

func (s selector) match(obj object) bool {
	return obj != nil &&
		(s.namespace == "" || obj.GetNamespace() == s.namespace) &&
		s.fields.Matches(fieldsOf(obj)) && s.labels.Matches(labels.Set(obj.GetLabels()))
}

func newObject(resource string) object {
	if resource == namespaces {
		return &corev1.Namespace{}
	}
	return &corev1.Pod{}
}
