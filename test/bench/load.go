package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

const (
	connections = 8
	loadTime    = 300 * time.Millisecond
)

// load repeats a request on 8 keep-alive connections for a short time. It prints the responses per
// second and the 99th percentile of their time in microseconds. It writes and reads HTTP by hand:
// on two cores, a client takes its time from the server that is measured.
func load(method, path, header string, out io.Writer) int {
	request := fmt.Appendf(nil, "%s %s HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: bench\r\n%s\r\n\r\n", method, path, header)
	took := make([][]time.Duration, connections)
	errs := make([]error, connections)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range connections {
		wg.Go(func() { took[i], errs[i] = one(request, start.Add(loadTime)) })
	}
	wg.Wait()
	all := slices.Concat(took...)
	elapsed := time.Since(start)
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		return 1
	}
	slices.Sort(all)
	fmt.Fprintln(out, float64(len(all))/elapsed.Seconds(), all[len(all)*99/100].Microseconds())
	return 0
}

func one(request []byte, end time.Time) ([]time.Duration, error) {
	c, err := net.DialTimeout("tcp", "169.254.169.254:80", 5*time.Second)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(end.Add(5 * time.Second))
	r := bufio.NewReader(c)
	took := make([]time.Duration, 0, 1<<14)
	for now := time.Now(); now.Before(end); {
		if _, err := c.Write(request); err != nil {
			return nil, err
		}
		if err := discardResponse(r); err != nil {
			return nil, err
		}
		then := now
		now = time.Now()
		took = append(took, now.Sub(then))
	}
	return took, nil
}

var (
	statusOK      = []byte("HTTP/1.1 200 ")
	contentLength = []byte("Content-Length: ")
)

func discardResponse(r *bufio.Reader) error {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(line, statusOK) {
		return fmt.Errorf("answer %q", line)
	}
	length := -1
	for {
		if line, err = r.ReadSlice('\n'); err != nil {
			return err
		}
		if len(line) == 2 {
			break
		}
		if v, ok := bytes.CutPrefix(line, contentLength); ok {
			if length, err = strconv.Atoi(string(v[:len(v)-2])); err != nil {
				return err
			}
		}
	}
	if length < 0 {
		return fmt.Errorf("an answer without Content-Length")
	}
	_, err = r.Discard(length)
	return err
}
