// SPDX-License-Identifier: GPL-2.0

//! A mapping being created: the argument of the device's `mmap(2)` hook.
//!
//! The unsafe side (`rust/` out of tree): the kernel crate wraps the VMA that `f_op->mmap` gets,
//! but not the description that `f_op->mmap_prepare` gets.
//!
//! Either hook replaces the device's file by another. The mm calls `f_op->mmap_prepare` before it
//! looks for neighbours to merge with, so adjacent mappings become one VMA, as on tmpfs. But a
//! kernel without the fix in `patches/host` then leaks a reference to the new file for every
//! mapping that merges. The mm calls `f_op->mmap` after it has allocated the VMA, and nothing
//! merges.
//!
//! `DEVANON_MMAP_PREPARE` in `Kbuild` selects the hook.
//!
//! C header: [`include/linux/mm_types.h`](srctree/include/linux/mm_types.h).

/// A VMA that is not in use yet.
#[cfg(not(devanon_mmap_prepare))]
pub(crate) use kernel::mm::virt::VmaNew as NewVma;

/// A `struct vm_area_desc`: describes what becomes a VMA, or a part of one.
///
/// # Invariants
///
/// The description belongs to a call of `f_op->mmap_prepare` that is in progress.
#[cfg(devanon_mmap_prepare)]
#[repr(transparent)]
pub(crate) struct NewVma(kernel::types::Opaque<super::bindings::vm_area_desc>);

#[cfg(devanon_mmap_prepare)]
impl NewVma {
    /// # Safety
    ///
    /// `desc` must be the argument of a call of `f_op->mmap_prepare` that lasts for `'a`.
    pub(super) unsafe fn from_raw<'a>(desc: *mut super::bindings::vm_area_desc) -> &'a Self {
        // SAFETY: `Self` is transparent over an `Opaque`, and the caller vouches for the pointee.
        // INVARIANT: The caller vouches for the call too.
        unsafe { &*desc.cast() }
    }

    pub(super) fn as_ptr(&self) -> *mut super::bindings::vm_area_desc {
        self.0.get()
    }
}
