// SPDX-License-Identifier: GPL-2.0

//! Allocations that fail: each in turn, on every way into the driver.
