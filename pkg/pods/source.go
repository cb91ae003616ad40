package pods

import (
	"cmp"
	"net/netip"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Source is a source address and its holder, according to this node's records at one moment.
type Source struct {
	IP       netip.Addr
	record   *attachment.Record // nil if there is none, or if it cannot be read
	reported string             // if record is nil: the UID of the only pod that reports the address
	err      error              // set if the record cannot be read
}

// Same reports whether the address has the same holder in both. It returns false if a record cannot
// be read, because the holder is then unknown.
func (s Source) Same(other Source) bool {
	if s.err != nil || other.err != nil {
		return false
	}
	// If s has no holder and other no record, the watch may have received a pod that reports the
	// address since s.
	return s.Identity() == other.Identity() || s.Identity() == "" && other.record == nil
}

// Source looks the address up in the records. It makes one system call and no request.
func (r *Resolver) Source(ip netip.Addr) Source {
	record, err := r.c.Records.Holder(ip)
	s := Source{IP: ip, record: record, err: err}
	if record == nil && r.c.Watch != nil {
		if reporting := r.c.Watch.reporting(ip); len(reporting) == 1 {
			s.reported = string(cmp.Or(reporting[0].Mirror, reporting[0].UID))
		}
	}
	return s
}

// Holder returns the UID of the pod that holds the address according to its record. Without a
// record, it returns the UID of the only pod that reports the address, or an empty string. The
// value does not change when a record is written for the pod later.
func (s Source) Holder() string {
	if s.record == nil {
		return s.reported
	}
	return s.record.Pod.UID
}

// Identity returns a value that differs for each holder of the address, or an empty string if the
// holder is unknown. It is that of Holder, or the attachment's ID if the record has no UID.
func (s Source) Identity() string {
	switch {
	case s.err != nil:
		return "a holder whose record cannot be read"
	case s.record != nil && s.record.Pod.UID == "":
		return s.record.ID()
	}
	return s.Holder()
}

// String returns the pod of the record, or the address if there is none.
func (s Source) String() string {
	if s.record == nil || s.record.Pod.Name == "" {
		return s.IP.String()
	}
	return s.record.Pod.Namespace + "/" + s.record.Pod.Name
}
