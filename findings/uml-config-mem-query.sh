#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# User-Mode Linux of user-mode-linux 6.1um4+b13 (Debian 12) answers the console's
# request "config mem" not with how much memory the guest has, but with 1610612736,
# which is 0x60000000, the address where the guest's physical memory begins. The same
# number comes with any mem=.
#
# Here two guests are started that do nothing, with 64 and with 96 MiB, and
# uml_mconsole of uml-utilities 20070815.4-1 asks them.
#
# Seen:
#
#	mem=64M: OK 1610612736
#	mem=96M: OK 1610612736
#
# So a program that moves memory by the console has to count by itself what it took.

# shellcheck source=findings/common.bash
. "$(dirname "$0")/common.bash"
begin "$@"
need setsid timeout
debian bookworm user-mode-linux=6.1um4+b13 uml-utilities=20070815.4-1 \
	busybox-static=1:1.35.0-4+deb12u1+b1

guest=
trap '[[ ! $guest ]] || kill -KILL -- "-$guest" 2>/dev/null || true; rm -rf -- "$tmp"' EXIT

# ask COMMAND...: sends the guest a command. The warnings are about other places
# where a socket could be.
ask() {
	timeout 5 "$root/usr/bin/uml_mconsole" "$tmp/uml/guest/mconsole" "$@" 2>/dev/null
}

# answer SIZE: starts a guest, and sets $reply to its answer.
answer() {
	local try
	mkdir -p uml
	setsid "$root/usr/bin/linux.uml" "mem=$1" umid=guest "uml_dir=$tmp/uml/" con=null \
		con0=null,fd:1 root=/dev/root rootfstype=hostfs "rootflags=$root" ro \
		init=/bin/busybox -- sleep 60 </dev/null >guest.log 2>&1 &
	guest=$!
	for ((try = 0; try < 100; try++)); do
		if ask version >/dev/null; then
			break
		fi
		kill -0 "$guest" 2>/dev/null || break
		sleep 0.2
	done
	ask version >/dev/null || { cat guest.log >&2; die "the guest does not run"; }
	reply=$(ask config mem) || true
	ask halt >/dev/null || true
	for ((try = 0; try < 50; try++)); do
		kill -0 "$guest" 2>/dev/null || break
		sleep 0.1
	done
	kill -KILL -- "-$guest" 2>/dev/null || true
	wait "$guest" || true
	guest=
	rm -rf uml
}

answer 64M
small=$reply
answer 96M

verdict "mem=64M: $small
mem=96M: $reply" \
	"mem=64M: OK 1610612736
mem=96M: OK 1610612736"
