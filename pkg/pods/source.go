package pods

import (
	"cmp"
	"net/netip"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Source is a source address and its holder according to this node's records, at one moment.
type Source struct {
	IP       netip.Addr
	record   *attachment.Record
	reported string // the UID of the one pod that reports the address, where no record can be read
	err      error
}

// Same reports whether the address has the same holder in both. It is false if the holder is
// unknown because a record cannot be read.
func (s Source) Same(other Source) bool {
	if s.err != nil || other.err != nil {
		return false
	}
	// A pod that reports the address may have become known since.
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

// Holder returns the UID of the pod that the records say holds the address, or else of the pod that
// reports it, or else an empty string. The value does not change when a record is written for the
// pod later.
func (s Source) Holder() string {
	if s.record == nil {
		return s.reported
	}
	return s.record.Pod.UID
}

// Identity returns a value that differs for each holder of the address, or an empty string if the
// holder is not known. It is the pod's UID, which does not change when a record is written later,
// or the attachment's ID if the record has no UID.
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
