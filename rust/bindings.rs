// SPDX-License-Identifier: GPL-2.0

//! The kernel crate's bindings, and what they lack, which bindgen makes from `bindings_helper.h`.
//!
//! The unsafe side (`rust/` out of tree): raw C declarations.

#![allow(
    clippy::all,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

pub(crate) use kernel::bindings::*;

use kernel::ffi;

include!(env!("DEVANON_BINDINGS"));
