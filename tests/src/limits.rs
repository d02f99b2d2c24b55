// SPDX-License-Identifier: GPL-2.0

//! Many of everything, and what happens where a limit is reached.
