#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# mke2fs -d of e2fsprogs 1.47.2-3+b12 (Debian 13) copies a folder to a new image, with
# the times of its files, but cuts these times to whole seconds. ext4 has nanoseconds,
# and the inodes of this image have room for them; debugfs shows that they are 0.
#
# Seen, mtime as debugfs prints it, the seconds and the field with the nanoseconds:
#
#	source: 1577836800.123456789
#	inode size: 256
#	mtime: 0x5e0be100:00000000
#
# So compare times of an image with its source by whole seconds.

# shellcheck source=findings/common.bash
. "$(dirname "$0")/common.bash"
begin "$@"
debian trixie e2fsprogs=1.47.2-3+b12

mkdir source
echo data >source/file
touch -d '2020-01-01 00:00:00.123456789' source/file
MKE2FS_CONFIG=$root/etc/mke2fs.conf run sbin/mke2fs -q -t ext4 -I 256 -d source image 8M
inode_size=$(run sbin/debugfs -R 'stats' image 2>/dev/null | awk '/^Inode size:/ { print $3 }')
mtime=$(run sbin/debugfs -R 'stat file' image 2>/dev/null | awk '$1 == "mtime:" { print $2 }')

verdict "source: $(stat -c %.9Y source/file)
inode size: $inode_size
mtime: $mtime" \
	"source: 1577836800.123456789
inode size: 256
mtime: 0x5e0be100:00000000"
