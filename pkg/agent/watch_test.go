package agent

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// TestWatchRules removes tables and receives the notifications.
func TestWatchRules(t *testing.T) {
	host := netnstest.New(t)
	host.Enter()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	host.Run("nft add table ip kube2iam-cni")
	notified := make(chan struct{}, 100)
	ended := make(chan error)
	watching := make(chan struct{})
	go func() {
		host.Enter()
		close(watching)
		ended <- watchRules(ctx, func() { notified <- struct{}{} })
	}()
	<-watching
	// The socket is not there at once: changes are made until one is noticed.
	for isNotified := false; !isNotified; {
		host.Run("nft add table ip other; nft delete table ip other")
		select {
		case <-notified:
			isNotified = true
		case <-time.After(10 * time.Millisecond):
		}
	}
	host.Run("nft delete table ip kube2iam-cni")
	select {
	case <-notified:
	case <-time.After(10 * time.Second):
		t.Error("no notification of a deleted table")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("got %v", err)
	}
}

// TestIsRelevant has the kernel's notifications of real changes: those that can concern the agent's
// rules are relevant, those of other programs' chains are not.
func TestIsRelevant(t *testing.T) {
	host := netnstest.New(t)
	host.Enter()
	for _, command := range []string{
		"iptables-nft -t nat -N KUBE-SERVICES", "iptables-nft -t nat -A KUBE-SERVICES -j RETURN", "iptables-nft -t nat -N KUBE-OLD",
		"iptables-nft -t nat -A PREROUTING -j KUBE-SERVICES", "iptables-nft -A FORWARD -j ACCEPT", "iptables-nft -t mangle -A POSTROUTING -j ACCEPT",
		"iptables-nft -A INPUT -j ACCEPT", "iptables-nft -t nat -N KUBE2IAM-CNI", "iptables-nft -t nat -A KUBE2IAM-CNI -j RETURN",
		"nft add table ip kube-proxy", "nft add chain ip kube-proxy x", "nft add rule ip kube-proxy x counter",
		"nft add table ip kube2iam-cni", "nft add chain ip kube2iam-cni guard", "nft add rule ip kube2iam-cni guard counter",
	} {
		host.Run(command)
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, tc := range []struct {
		change string
		want   bool
	}{
		{"iptables-nft -t nat -A KUBE-SERVICES -s 10.0.0.1 -j RETURN", false},
		{"iptables-nft -t nat -F KUBE-SERVICES", false},
		{"iptables-nft -t nat -X KUBE-OLD", false},
		{"iptables-nft -F INPUT", false},
		{"nft flush chain ip kube-proxy x", false},
		{"nft add rule ip kube2iam-cni guard counter", false},
		{"iptables-nft -t nat -A POSTROUTING -j RETURN", false},
		{"iptables-nft -t mangle -A PREROUTING -j RETURN", false},
		{"iptables-nft -t nat -I PREROUTING -j RETURN", false}, // above our jump, which is not moved
		{"nft flush chain ip kube2iam-cni guard", true},
		{"nft delete chain ip kube2iam-cni guard", true},
		{"iptables-nft -F FORWARD", true},
		{"iptables-nft -t mangle -F", true},
		{"iptables-nft -t nat -F KUBE2IAM-CNI", true},
		{"iptables-nft -t nat -F", true},
		{"nft delete table ip kube-proxy", true}, // whatever tables go, ours may have gone along
	} {
		host.Run(tc.change)
		host.Run("nft add table ip the-end")
		concerned := false
		for ended := false; !ended; {
			messages, err := conn.Receive()
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range messages {
				if bytes.Contains(m.Data, []byte("the-end")) {
					ended = true
				} else if !ended && isRelevant(m) {
					concerned = true
				}
			}
		}
		if concerned != tc.want {
			t.Errorf("%s: concerns the agent: %v, want %v", tc.change, concerned, tc.want)
		}
		host.Run("nft delete table ip the-end")
		for ended := false; !ended; {
			messages, err := conn.Receive()
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range messages {
				ended = ended || int(m.Header.Type)&0xff == unix.NFT_MSG_DELTABLE && bytes.Contains(m.Data, []byte("the-end"))
			}
		}
	}
}
