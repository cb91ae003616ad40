// Command refuser answers every HTTP request on port 8080 with 500, and prints its request line and
// user agent.
package main

import (
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	failed := make(chan error, 1)
	go func() {
		failed <- http.ListenAndServe(":8080", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Printf("%s %q %q\n", r.Method, r.URL.Path, r.UserAgent())
			http.Error(w, "refused", http.StatusInternalServerError)
		}))
	}()
	select {
	case err := <-failed:
		fmt.Fprintln(os.Stderr, "refuser:", err)
		os.Exit(1)
	case <-stop:
	}
}
