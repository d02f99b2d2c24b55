#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# bindgen 0.71.1-6 (Debian 13) translates a C struct with the attributes packed and
# aligned(4) to #[repr(C, packed(4))]. That is another layout: C packs the fields without
# gaps and aligns the whole to 4, Rust aligns each field to as much as 4. Headers of the
# kernel have many structs like this. bindgen exits 0; with its own layout tests the
# output does not compile (rustc 1.85.1+dfsg1-1+deb13u1), and without them
# (--no-layout-tests) fields are at wrong offsets.
#
# bindgen's issue 2878 on GitHub reports the same.
#
# Seen, for a char and a long long:
#
#	bindgen: exit status 0
#	#[repr(C, packed(4))]
#	["Offset of field: pair::second"][::core::mem::offset_of!(pair, second) - 1usize];
#	rustc: exit status 1, error[E0080]
#	rustc, without layout tests, second at 4: exit status 0
#
# So check layouts that bindgen made, and have its layout tests compiled.

# shellcheck source=findings/common.bash
. "$(dirname "$0")/common.bash"
begin "$@"
debian trixie bindgen=0.71.1-6 rustc=1.85.1+dfsg1-1+deb13u1

cat >pair.h <<EOF
struct pair {
	char first;
	long long second;
} __attribute__((packed, aligned(4)));
EOF

export LIBCLANG_PATH=$root/usr/lib/llvm-19/lib
status=0
run bin/bindgen --use-core --formatter prettyplease pair.h >tested.rs 2>log || status=$?
run bin/bindgen --use-core --formatter prettyplease --no-layout-tests pair.h >untested.rs 2>log
echo 'const _: () = assert!(core::mem::offset_of!(pair, second) == 4);' >>untested.rs

# compile FILE: prints how rustc ends, and its kinds of errors.
compile() {
	local status=0
	run bin/rustc --sysroot "$root/usr" --edition 2021 --crate-type lib --emit metadata \
		-A warnings -o out.rmeta "$1" 2>log || status=$?
	echo "exit status $status$(sed -n 's/^\(error\[E[0-9]*\]\).*/, \1/p' log | sort -u | tr -d '\n')"
}

verdict "bindgen: exit status $status
$(grep -F 'repr(' tested.rs)
$(sed -n '/pair::second/s/^ *//p' tested.rs)
rustc: $(compile tested.rs)
rustc, without layout tests, second at 4: $(compile untested.rs)" \
	'bindgen: exit status 0
#[repr(C, packed(4))]
["Offset of field: pair::second"][::core::mem::offset_of!(pair, second) - 1usize];
rustc: exit status 1, error[E0080]
rustc, without layout tests, second at 4: exit status 0'
