#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# cpio of toybox 0.8.9+dfsg-1.1 (Debian 13) knows no hard links when it unpacks
# a newc archive, the format of an initramfs. In such an archive one name of a file
# carries the data, and the others have the same inode number and size 0. GNU cpio
# 2.15+dfsg-2 makes three links of one file from them. toybox makes three files, two
# of them empty, and exits 0.
#
# Here GNU cpio packs one file of 5 bytes with three names.
#
# Seen, name, size and number of links:
#
#	cpio: exit status 0
#	one 5 3
#	three 5 3
#	two 5 3
#	toybox cpio: exit status 0
#	one 0 1
#	three 5 1
#	two 0 1
#
# So do not unpack an initramfs with toybox to change it.

# shellcheck source=findings/common.bash
. "$(dirname "$0")/common.bash"
begin "$@"
debian trixie toybox=0.8.9+dfsg-1.1 cpio=2.15+dfsg-2

mkdir in gnu toybox
echo data >in/one
ln in/one in/two
ln in/one in/three
(cd in && printf '%s\n' one two three | run bin/cpio --quiet -o -H newc) >archive.cpio

# unpack FOLDER COMMAND...: unpacks there, and tells what came of it.
unpack() {
	local status=0
	cd "$tmp/$1"
	shift
	run "$@" <"$tmp/archive.cpio" >/dev/null 2>&1 || status=$?
	echo "exit status $status"
	stat -c '%n %s %h' one three two
}

verdict "cpio: $(unpack gnu bin/cpio -i)
toybox cpio: $(unpack toybox bin/toybox cpio -i)" \
	"cpio: exit status 0
one 5 3
three 5 3
two 5 3
toybox cpio: exit status 0
one 0 1
three 5 1
two 0 1"
