// SPDX-License-Identifier: GPL-2.0

//! A user who means harm: random calls, and files reached by every way there is.
