# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Finds Debian's archives in this machine's APT configuration. Sourced after lib.sh, not run.

# shellcheck disable=SC2154 # lib.sh sets $me

# archive_uri LABEL: print the URI of the Debian archive whose Release files have LABEL, or nothing if APT
# has none. An entry for trixie takes precedence over other releases. Of a file of mirrors, the first is used.
archive_uri() {
	local codename uri first=
	while read -r codename uri; do
		[[ $codename != *-debug ]] || continue	# the archive of debug symbols
		case $uri in
		http://* | https://*) ;;
		mirror+file:*)
			uri=${uri#mirror+file:}
			uri=$(grep -soEm 1 '^https?://[^[:space:]]+' "${uri%/}") || continue ;;
		*) continue ;;	# cdrom, file and the like: APT inside the build root cannot use them
		esac
		first=${first:-$uri}
		[[ $codename != trixie* ]] || { first=$uri; break; }
	done < <(
		# shellcheck disable=SC2016 # APT's own syntax
		apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Origin: Debian' "Label: $1"
	)
	[ -z "$first" ] || echo "${first%/}"
}

# debian_sources SUITE...: print the sources.list lines of these suites. A security suite is left out if
# this machine has no security archive.
debian_sources() {
	local main security suite
	main=$(archive_uri Debian)
	if [ -z "$main" ]; then
		# APT knows origins and labels from the Release files, which a fresh image lacks.
		echo "$me: fetching this machine's package lists" >&2
		apt-get -qq update >&2 || :
		main=$(archive_uri Debian)
	fi
	[ -n "$main" ] || die "this machine's APT has no archive of Debian with an http or https URI."
	security=$(archive_uri Debian-Security)
	for suite; do
		case $suite in
		*-security) [ -z "$security" ] || echo "deb $security $suite main" ;;
		*) echo "deb $main $suite main" ;;
		esac
	done
}
