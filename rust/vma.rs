// SPDX-License-Identifier: GPL-2.0

//! A mapping in the making: what `mmap(2)` of the device is given.
//!
//! Either way the device puts another file in place of its own. With `f_op->mmap_prepare` the mm
//! asks before it looks for neighbours to merge with, so adjacent mappings become one VMA, as those
//! of tmpfs do. But a kernel without the fix of `patches/host` then leaks a reference to that file
//! for every mapping that merges. `f_op->mmap` asks once the VMA is made, and nothing merges.
//!
//! `Kbuild` decides, by `DEVANON_MMAP_PREPARE`.
//!
//! C header: [`include/linux/mm_types.h`](srctree/include/linux/mm_types.h).

/// A VMA that nobody has seen yet.
#[cfg(not(devanon_mmap_prepare))]
pub(crate) use kernel::mm::virt::VmaNew as NewVma;

/// A `struct vm_area_desc`: what is to become a VMA, or a part of one.
///
/// # Invariants
///
/// It belongs to a call of `f_op->mmap_prepare` that is under way.
#[cfg(devanon_mmap_prepare)]
#[repr(transparent)]
pub(crate) struct NewVma(kernel::types::Opaque<super::bindings::vm_area_desc>);

#[cfg(devanon_mmap_prepare)]
impl NewVma {
    /// # Safety
    ///
    /// `desc` is what the mm calls `f_op->mmap_prepare` with, and that call lasts for `'a`.
    pub(super) unsafe fn from_raw<'a>(desc: *mut super::bindings::vm_area_desc) -> &'a Self {
        // SAFETY: `Self` is transparent over an `Opaque`, and the caller vouches for the pointee.
        // INVARIANT: So does the caller for the call.
        unsafe { &*desc.cast() }
    }

    pub(super) fn as_ptr(&self) -> *mut super::bindings::vm_area_desc {
        self.0.get()
    }
}
