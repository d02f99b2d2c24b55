# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# What the scripts of this folder have in common: they source this file.
#
# Exit status of each script: 0 the tool behaves as stated, 1 it does not any
# more, 2 wrong usage, or the script cannot run here.

set -Eeuo pipefail
export LC_ALL=C TZ=UTC
umask 022

die() {
	echo "${0##*/}: $*" >&2
	exit 2
}

# begin ARGUMENT...: handles the arguments, makes the temporary folder $tmp.
begin() {
	if (($# == 1)) && [[ $1 == --help ]]; then
		echo "usage: ${0##*/} [--help]"
		awk 'NR > 2 && !/^#/ { exit } NR > 2 { sub(/^# ?/, ""); print }' "$0"
		echo
		echo "Exit status: 0 as stated, 1 changed, 2 wrong usage or cannot run."
		exit 0
	fi
	(($# == 0)) || die "takes no arguments, see --help"
	tmp=$(mktemp -d) || die "no temporary folder"
	trap 'rm -rf -- "$tmp"' EXIT
	trap 'exit 2' HUP INT TERM
	# What may fail is asked for its status; anything else that fails is no verdict.
	trap 'die "line $LINENO: failed: $BASH_COMMAND"' ERR
	cd "$tmp"
	root=$tmp/root
}

need() {
	local tool
	for tool; do
		[[ $(type -P "$tool") ]] || die "needs $tool"
	done
}

# debian SUITE PACKAGE=VERSION...: unpacks packages of a suite of Debian, and all
# that they depend on, to $root. The mirror is the one of the machine.
debian() {
	local suite=$1 keys=/usr/share/keyrings/debian-archive-keyring.gpg uri deb
	shift
	need apt-get dpkg dpkg-deb
	[[ $(dpkg --print-architecture) == amd64 ]] || die "needs amd64"
	[[ -r $keys ]] || die "needs $keys"
	# shellcheck disable=SC2016 # apt's own variables
	uri=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' |
		awk '$1 ~ /^(bookworm|trixie|forky|sid|stable|oldstable|testing|unstable)$/ && !n++ { print $2 }')
	[[ $uri ]] || die "apt has no mirror of Debian"

	mkdir -p apt/state/lists/partial apt/cache/archives/partial "$root"
	: >apt/status
	echo "deb [arch=amd64 signed-by=$keys] $uri $suite main" >apt/sources.list
	cat >apt/conf <<-EOF
		Dir::State "$tmp/apt/state";
		Dir::State::status "$tmp/apt/status";
		Dir::Cache "$tmp/apt/cache";
		Dir::Log "$tmp/apt";
		Dir::Etc::sourcelist "$tmp/apt/sources.list";
		Dir::Etc::sourceparts "/dev/null";
		Dir::Etc::preferences "/dev/null";
		Dir::Etc::preferencesparts "/dev/null";
		Acquire::Languages "none";
		APT::Architecture "amd64";
		APT::Sandbox::User "root";
		APT::Install-Recommends "false";
		APT::Keep-Downloaded-Packages "true";
		#clear APT::Architectures;
		#clear APT::Update::Pre-Invoke;
		#clear APT::Update::Post-Invoke;
		#clear APT::Update::Post-Invoke-Success;
		#clear DPkg::Pre-Install-Pkgs;
		#clear DPkg::Pre-Invoke;
		#clear DPkg::Post-Invoke;
	EOF
	apt-get -c apt/conf -qq update >apt/log 2>&1 || { cat apt/log >&2; die "no lists of $suite"; }
	apt-get -c apt/conf -qq -y --download-only install "$@" >apt/log 2>&1 ||
		{ cat apt/log >&2; die "the archive may not have these versions any more: $*"; }
	for deb in apt/cache/archives/*.deb; do
		dpkg-deb -x "$deb" "$root"
	done
}

# run PROGRAM ARGUMENT...: runs a program of $root with the libraries of $root.
# PROGRAM is a path below /usr.
run() {
	local lib=$root/usr/lib/x86_64-linux-gnu program=$root/usr/$1
	shift
	"$lib/ld-linux-x86-64.so.2" --library-path "$lib" --argv0 "$program" "$program" "$@"
}

# verdict GOT WANT: prints what was seen, and ends the script.
verdict() {
	echo "$1"
	echo
	if [[ $1 == "$2" ]]; then
		echo "as stated"
		exit 0
	fi
	echo "changed; stated was:"
	echo "$2"
	exit 1
}
