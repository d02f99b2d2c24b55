# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What the scripts of this directory share. Sourced, not run.

# shellcheck disable=SC2034 # not every script uses every name

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
build=$project/build
root=$build/root
me=${0##*/}
bin=$build/bin		# our programs
# For devanon-vm: a Debian userland for guests, and what else the tests of ubd=mmap read.
ubd_files=(--disk "$build/uml/files.disk" --file "$build/uml/debian.img=/lib/devanon/debian.img")
for kind in ext4 squashfs; do
	ubd_files+=(--file "$build/uml/files.$kind=/lib/devanon/files.$kind")
done
kernel_lines=(7.3 7.2)	# what the module is built for and tested on, newest first

# in_tree KERNEL: set $driver_options to the options of devanon-vm for a kernel of our own. Unless the driver is built
# in, they name the module of the kernel's own tree in place of the one for stock kernels.
in_tree() {
	local module=$build/kernels/$1/modules/kernel/drivers/char/devanon/devanon.ko
	driver_options=(--bare --file "$bin/devanon-tests=/bin/devanon-tests")
	[ ! -e "$module" ] || driver_options+=(--file "$module=/lib/devanon/devanon.ko")
}

die() {
	echo "$me: $*" >&2
	exit 1
}

need_root() {
	[ "$(id -u)" = 0 ] || die "must run as root: it uses chroot and mount namespaces."
}

# One run at a time. The processes that a run starts hold the lock too, so the next run waits
# until the last process of an interrupted one is gone.
take_lock() {
	mkdir -p "$build"
	exec 9>"$build/.lock-$1"
	flock --nonblock 9 || { echo "$me: waiting for another run to end" >&2; flock 9; }
}

# Name the log file, unless a calling script already did.
start_log() {
	[ -z "${DEVANON_LOG-}" ] || return 0
	export DEVANON_LOG=$build/log/$1.log
	mkdir -p "$build/log"
	: >"$DEVANON_LOG"
	echo "full log: $DEVANON_LOG" >&2
}

# used: set $used to the processor time of this shell's children that have ended, in hundredths of a second.
used() {
	local fields
	read -r fields <"/proc/$BASHPID/stat"
	read -ra fields <<<"${fields##*) }"
	used=$((fields[13] + fields[14]))
}

# took PART HUNDREDTHS SECONDS: note what a part of the work took, for scripts/shares. Only scripts/test and the
# preparation of its goals set DEVANON_TOOK.
took() {
	[ -z "${DEVANON_TOOK-}" ] || printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$DEVANON_TOOK"
}

# step NAME COMMAND...: run COMMAND with its output in the log; print NAME, the time it took and the processor time.
# It belongs to the part of the work that DEVANON_PART names.
step() {
	local name=$1 start=$SECONDS status=0 before
	shift
	used
	before=$used
	printf '  %-52s ' "$name" >&2
	printf '\n### %s: %s\n' "$name" "$*" >>"$DEVANON_LOG"
	"$@" >>"$DEVANON_LOG" 2>&1 || status=$?
	if [ "$status" != 0 ]; then
		echo "FAILED (status $status)" >&2
		tail -n 20 "$DEVANON_LOG" | sed 's/^/    | /' >&2
		echo "$me: step \"$name\" failed; full log: $DEVANON_LOG" >&2
		exit "$status"
	fi
	used
	printf '%4d s, %4d s CPU\n' $((SECONDS - start)) $(((used - before) / 100)) >&2
	took "${DEVANON_PART:-$me}" $((used - before)) $((SECONDS - start))
}

# contained COMMAND...: run COMMAND in a mount and a PID namespace of its own. Its mounts
# are never visible outside, and it dies with all its children when this script does.
contained() {
	local status=0 child sig
	# Bash starts background jobs with SIGINT and SIGQUIT ignored: undo that.
	env --default-signal=INT,QUIT setpriv --pdeathsig KILL \
		unshare --mount --pid --fork --kill-child -- "$@" <&0 &
	child=$!
	# Die of the signal, so that the calling scripts and make stop too.
	# shellcheck disable=SC2064 # expanded now on purpose
	for sig in HUP INT TERM; do
		trap "kill -KILL $child 2>/dev/null; trap - $sig; kill -$sig \$BASHPID" "$sig"
	done
	wait "$child" || status=$?
	trap - HUP INT TERM
	return "$status"
}
