package node

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// TestChanges has the agent told of what is taken away, which it then takes.
func TestChanges(t *testing.T) {
	n := newNetwork(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var said strings.Builder
	n.run("nft add table ip kube2iam-cni")
	changes, err := Changes(ctx, slog.New(slog.NewTextHandler(&said, nil)))
	n.must(err)
	for _, change := range []string{"nft delete table ip kube2iam-cni", "nft add table ip somebody", "nft flush ruleset"} {
		n.run(change)
		if strings.Contains(change, " add ") {
			continue
		}
		select {
		case <-changes:
		case <-time.After(10 * time.Second):
			t.Errorf("%s: nothing was told", change)
		}
	}
	cancel()
	if said.Len() > 0 {
		t.Errorf("said %s", &said)
	}
}

// TestConcerns tells what could be ours from what is others' own matter, by what the kernel says of real changes.
func TestConcerns(t *testing.T) {
	n := newNetwork(t)
	for _, command := range []string{
		"iptables-nft -t nat -N KUBE-SERVICES", "iptables-nft -t nat -A KUBE-SERVICES -j RETURN", "iptables-nft -t nat -N KUBE-OLD",
		"iptables-nft -t nat -A PREROUTING -j KUBE-SERVICES", "iptables-nft -A FORWARD -j ACCEPT", "iptables-nft -t mangle -A POSTROUTING -j ACCEPT",
		"iptables-nft -A INPUT -j ACCEPT", "iptables-nft -t nat -N KUBE2IAM-CNI", "iptables-nft -t nat -A KUBE2IAM-CNI -j RETURN",
		"nft add table ip kube-proxy", "nft add chain ip kube-proxy x", "nft add rule ip kube-proxy x counter",
		"nft add table ip kube2iam-cni", "nft add chain ip kube2iam-cni guard", "nft add rule ip kube2iam-cni guard counter",
	} {
		n.run(command)
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	n.must(err)
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
		{"iptables-nft -t nat -I PREROUTING -j RETURN", true}, // above our jump
		{"nft flush chain ip kube2iam-cni guard", true},
		{"nft delete chain ip kube2iam-cni guard", true},
		{"iptables-nft -F FORWARD", true},
		{"iptables-nft -t mangle -F", true},
		{"iptables-nft -t nat -F KUBE2IAM-CNI", true},
		{"iptables-nft -t nat -F", true},
		{"nft delete table ip kube-proxy", true}, // whatever tables go, ours may have gone along
	} {
		n.run(tc.change)
		n.run("nft add table ip the-end")
		concerned := false
		for ended := false; !ended; {
			messages, err := conn.Receive()
			n.must(err)
			for _, m := range messages {
				if bytes.Contains(m.Data, []byte("the-end")) {
					ended = true
				} else if !ended && concerns(m) {
					concerned = true
				}
			}
		}
		if concerned != tc.want {
			t.Errorf("%s: concerns the agent: %v, want %v", tc.change, concerned, tc.want)
		}
		n.run("nft delete table ip the-end")
		for ended := false; !ended; {
			messages, err := conn.Receive()
			n.must(err)
			for _, m := range messages {
				ended = ended || int(m.Header.Type)&0xff == unix.NFT_MSG_DELTABLE && bytes.Contains(m.Data, []byte("the-end"))
			}
		}
	}
}
