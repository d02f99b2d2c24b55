#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# tap-parser 18.3.4 (npm; the parser of node-tap) calls a KTAP report failed in
# which all passed, if its tests are nested two deep. KTAP indents a level by two
# spaces, TAP 14 by four. So tap-parser ignores the first level of subtests and reads
# the second as the first. The tests of several subtests are one subtest for it then,
# whose numbers begin again and whose plan does not fit. With one level less the report
# passes.
#
# Seen:
#
#	one level: exit status 0
#	two levels: exit status 1
#	    # test count(4) != plan(2)
#
# So read the reports of kernels with a parser for KTAP.

# shellcheck source=findings/common.bash
. "$(dirname "$0")/common.bash"
begin "$@"
need node npm

npm install --prefix "$tmp/npm" --cache "$tmp/cache" --ignore-scripts --no-audit --no-fund \
	tap-parser@18.3.4 tap-yaml@4.4.2 events-to-array@2.0.3 yaml@2.9.1 yaml-types@0.4.0 >log 2>&1 ||
	{ cat log >&2; die "npm cannot install tap-parser 18.3.4"; }

cat >one <<EOF
KTAP version 1
1..1
  KTAP version 1
  # Subtest: range
  1..2
  ok 1 empty
  ok 2 full
ok 1 range
EOF
cat >two <<EOF
KTAP version 1
1..1
  KTAP version 1
  # Subtest: range
  1..2
    KTAP version 1
    # Subtest: empty
    1..2
    ok 1 small
    ok 2 large
  ok 1 empty
    KTAP version 1
    # Subtest: full
    1..2
    ok 1 small
    ok 2 large
  ok 2 full
ok 1 range
EOF

# parse FILE: prints the exit status of tap-parser, and what it complains of.
parse() {
	local status=0
	npm/node_modules/.bin/tap-parser -t <"$1" >out 2>&1 || status=$?
	echo "exit status $status"
	grep -F 'test count' out || true
}

verdict "one level: $(parse one)
two levels: $(parse two)" \
	"one level: exit status 0
two levels: exit status 1
    # test count(4) != plan(2)"
