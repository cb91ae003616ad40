package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"
)

const (
	connections = 8
	loadTime    = 300 * time.Millisecond
)

// load asks for path by 8 keep-alive connections for a moment and prints the requests per second. It writes and reads HTTP
// by hand: with two cores, what the client needs is taken from the server that is measured.
func load(path, token string, out io.Writer) int {
	request := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: bench\r\nX-aws-ec2-metadata-token: %s\r\n\r\n", path, token)
	counts := make([]int, connections)
	errs := make([]error, connections)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range connections {
		wg.Go(func() { counts[i], errs[i] = one(request, start.Add(loadTime)) })
	}
	wg.Wait()
	took := time.Since(start)
	total := 0
	for i := range connections {
		if errs[i] != nil {
			fmt.Fprintln(os.Stderr, "load:", errs[i])
			return 1
		}
		total += counts[i]
	}
	fmt.Fprintln(out, float64(total)/took.Seconds())
	return 0
}

func one(request []byte, end time.Time) (int, error) {
	c, err := net.DialTimeout("tcp", "169.254.169.254:80", 5*time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	c.SetDeadline(end.Add(5 * time.Second))
	r := bufio.NewReader(c)
	n := 0
	for time.Now().Before(end) {
		if _, err := c.Write(request); err != nil {
			return n, err
		}
		if err := discardResponse(r); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
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
