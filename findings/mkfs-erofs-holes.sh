#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# mkfs.erofs of erofs-utils 1.8.6-1 (Debian 13) writes the holes of a sparse file
# to the image as blocks of zeros, though EROFS can store holes: with --chunksize
# mkfs.erofs leaves them out. An image of a root filesystem with a sparse file, such
# as /var/log/lastlog, becomes as large as that file says that it is.
#
# Here the only file has a hole of 64 MiB and no data.
#
# Seen:
#
#	source: 67108864 bytes, 0 blocks on disk
#	mkfs.erofs: 67112960 bytes
#	mkfs.erofs --chunksize=4096: 4096 bytes
#
# So give mkfs.erofs --chunksize if the source may have sparse files.

# shellcheck source=findings/common.bash
. "$(dirname "$0")/common.bash"
begin "$@"
debian trixie erofs-utils=1.8.6-1

mkdir source
truncate -s 64M source/hole
run bin/mkfs.erofs plain.img source >log 2>&1
run bin/mkfs.erofs --chunksize=4096 chunks.img source >log 2>&1

verdict "source: $(stat -c '%s bytes, %b blocks on disk' source/hole)
mkfs.erofs: $(stat -c %s plain.img) bytes
mkfs.erofs --chunksize=4096: $(stat -c %s chunks.img) bytes" \
	"source: 67108864 bytes, 0 blocks on disk
mkfs.erofs: 67112960 bytes
mkfs.erofs --chunksize=4096: 4096 bytes"
