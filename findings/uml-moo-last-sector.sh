#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# uml_moo of uml-utilities 20070815.4-2.1 (Debian 13) merges a COW file and its
# backing file to a new image. If the size of the backing file is no multiple of 512,
# the new image lacks the bytes after the last whole sector. uml_moo says nothing
# and exits 0.
#
# Such images exist: mksquashfs -nopad makes them, for example. Here the image has
# 1,000 bytes, and the COW file is as uml_mkcow made it, nothing written to it.
#
# Seen:
#
#	image: 1000 bytes
#	uml_moo: exit status 0, no message
#	merged image: 512 bytes, the first 512 of the image
#
# So pad an image to whole sectors before a guest gets it.

# shellcheck source=findings/common.bash
. "$(dirname "$0")/common.bash"
begin "$@"
debian trixie uml-utilities=20070815.4-2.1

head -c 1000 /dev/zero | tr '\0' a >image
run bin/uml_mkcow image.cow image
status=0
run bin/uml_moo image.cow merged >log 2>&1 || status=$?

message="no message"
[[ ! -s log ]] || message=$(<log)
size=$(stat -c %s merged)
part="the first $size of the image"
cmp -s -n "$size" image merged || part="other than the image"

verdict "image: $(stat -c %s image) bytes
uml_moo: exit status $status, $message
merged image: $size bytes, $part" \
	"image: 1000 bytes
uml_moo: exit status 0, no message
merged image: 512 bytes, the first 512 of the image"
