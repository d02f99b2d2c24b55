// SPDX-License-Identifier: GPL-2.0

//! Memory that is short: cgroups, swap, huge pages, NUMA, processors that come and go.
