package netns

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// TestManyRequests: a pod makes a million pipelined requests. Each is answered, the
// neighbour is served meanwhile, and the proxy does not grow.
func TestManyRequests(t *testing.T) {
	onThese(t, []setup{routed}, func(t *testing.T, n *node) {
		n.proxy(slices.Concat(impatient, []string{"--pod-requests-per-second", "0"})...)
		greedy, neighbour := n.run("greedy", "app"), n.run("neighbour", "other")
		n.wantOwn(greedy, "app")
		n.wantOwn(neighbour, "other")
		const connections, each = 8, 125_000
		// The first requests cost what any number costs: buffers, connections.
		n.asksOften(greedy, connections, 12_500)
		before := n.residentMemory()

		stop, times := make(chan struct{}), served(nil)
		var neighbours sync.WaitGroup
		neighbours.Go(func() { times = n.servedAtOnce(neighbour, "other", stop) })
		n.asksOften(greedy, connections, each)
		close(stop)
		neighbours.Wait()
		if len(times) == 0 {
			t.Error("the neighbour was never served")
		}
		// A busy proxy collects its garbage late, within its memory limit. 32 bytes left of each request
		// would be more.
		after := n.residentMemory()
		if after > before+32<<20 {
			t.Errorf("the proxy has grown from %d to %d bytes", before, after)
		}
		t.Logf("the proxy has grown by %d KiB", (after-before)>>10)
		t.Logf("the neighbour was served %v", times)
	})
}

// asksOften requests the pod's role and a token in turn over each connection, and wants each
// answered.
func (n *node) asksOften(s *testbed.Sandbox, connections, each int) {
	n.t.Helper()
	const batch = 100
	var all strings.Builder
	for i := range batch {
		if i%2 == 0 {
			all.WriteString("GET " + credentials + " HTTP/1.1\r\nHost: x\r\n\r\n")
		} else {
			all.WriteString("PUT " + tokenPath + " HTTP/1.1\r\nHost: x\r\n" + ttlHeader + ": 60\r\nContent-Length: 0\r\n\r\n")
		}
	}
	errs := make(chan error, connections)
	for range connections {
		go func() {
			errs <- func() error {
				c, err := s.Netns.Dial("tcp", testbed.MetadataAddr)
				if err != nil {
					return err
				}
				defer c.Close()
				in := bufio.NewReaderSize(c, 64<<10)
				for range each / batch {
					if _, err := io.WriteString(c, all.String()); err != nil {
						return err
					}
					for i := range batch {
						res, err := http.ReadResponse(in, nil)
						if err != nil {
							return err
						}
						body, err := io.ReadAll(res.Body)
						if err != nil || res.StatusCode != http.StatusOK || i%2 == 0 && string(body) != "app" {
							return fmt.Errorf("answered %d %q, %v", res.StatusCode, body, err)
						}
					}
				}
				return nil
			}()
		}()
	}
	for range connections {
		n.must(<-errs)
	}
}

var resident = regexp.MustCompile(`(?m)^process_resident_memory_bytes (\S+)$`)

// residentMemory returns the proxy's resident memory in bytes, by its metric.
func (n *node) residentMemory() int {
	n.t.Helper()
	match := resident.FindStringSubmatch(n.metrics())
	if match == nil {
		n.t.Fatal("no metric of the proxy's memory")
	}
	bytes, err := strconv.ParseFloat(match[1], 64)
	n.must(err)
	return int(bytes)
}
