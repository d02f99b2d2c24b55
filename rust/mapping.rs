// SPDX-License-Identifier: GPL-2.0

//! The page cache of a shmem file: `invalidate_lock` and page counts.
//!
//! The unsafe side (`rust/` out of tree): the kernel crate does not wrap `struct address_space`, so
//! its raw pointers are handled here.
//!
//! Lock order: `mmap_lock` -> `invalidate_lock` -> folio lock -> `i_mmap_rwsem`.
//!
//! shmem does not use `invalidate_lock`. The driver holds it for writing while it frees pages, and
//! a fault that finds it taken takes it shared, and so waits. `i_rwsem` must not be taken under
//! `invalidate_lock`: a `write(2)` whose buffer is a mapping of the same file faults, and may take
//! `invalidate_lock`, under `i_rwsem`. Hence no `vfs_fallocate()` from here.
//!
//! C headers: [`include/linux/fs.h`](srctree/include/linux/fs.h),
//! [`include/linux/shmem_fs.h`](srctree/include/linux/shmem_fs.h).

use super::bindings;
use kernel::types::{
    NotThreadSafe,
    Opaque, //
};

// The driver keeps byte offsets in `usize`, and reads `i_size` without its seqcount.
const _: () = assert!(usize::BITS == 64);

/// A `struct address_space`, the page cache of one file.
///
/// # Invariants
///
/// The `address_space` is that of a shmem inode, embedded in it (`mapping == &host->i_data`).
#[repr(transparent)]
pub(crate) struct Mapping(Opaque<bindings::address_space>);

/// The number of pages a file has.
#[derive(Default)]
pub(crate) struct PageCounts {
    /// Pages in memory.
    pub(crate) resident: usize,
    /// Pages in swap.
    pub(crate) swapped: usize,
}

impl PageCounts {
    /// Pages in memory and in swap.
    pub(crate) fn total(&self) -> usize {
        self.resident + self.swapped
    }
}

impl Mapping {
    /// # Safety
    ///
    /// `ptr` must be the `i_mapping` of a shmem inode that lives for `'a`.
    pub(super) unsafe fn from_raw<'a>(ptr: *mut bindings::address_space) -> &'a Self {
        // SAFETY: `Self` is transparent over an `Opaque`, and the caller vouches for the pointee.
        // INVARIANT: The caller vouches for the inode too; shmem never redirects `i_mapping`.
        unsafe { &*ptr.cast() }
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::address_space {
        self.0.get()
    }

    pub(super) fn host(&self) -> *mut bindings::inode {
        // SAFETY: By the type invariant `self` is a live address space, whose `host` is set before
        // the inode is visible to anyone and constant from then on.
        unsafe { (*self.0.get()).host }
    }

    fn invalidate_sem(&self) -> *mut bindings::rw_semaphore {
        // SAFETY: The field lies inside the live `address_space`.
        unsafe { &raw mut (*self.0.get()).invalidate_lock }
    }

    /// Takes `invalidate_lock` for writing: faults of this file that begin now wait. May sleep.
    pub(crate) fn invalidate_lock(&self) -> InvalidateGuard<'_> {
        // SAFETY: The semaphore lives as long as `self`.
        unsafe { bindings::down_write(self.invalidate_sem()) };
        // INVARIANT: This task has just taken it.
        InvalidateGuard(self, NotThreadSafe)
    }

    /// Takes `invalidate_lock` shared, which keeps the driver from freeing pages. May sleep.
    pub(crate) fn invalidate_lock_shared(&self) -> SharedInvalidateGuard<'_> {
        // SAFETY: The semaphore lives as long as `self`.
        unsafe { bindings::down_read(self.invalidate_sem()) };
        // INVARIANT: This task has just taken it.
        SharedInvalidateGuard(self, NotThreadSafe)
    }

    /// Returns true if any task holds `invalidate_lock`, shared or for writing. Does not sleep.
    pub(crate) fn is_invalidate_locked(&self) -> bool {
        // SAFETY: The mapping is live.
        unsafe { bindings::devanon_invalidate_locked(self.0.get()) }
    }

    /// Counts the pages of the file. Takes no lock: a page that is added, removed, or moved to or
    /// from swap at the same moment may be missed, or counted twice.
    pub(crate) fn page_counts(&self) -> PageCounts {
        let (mut resident, mut swapped) = (0, 0);

        // SAFETY: By the type invariant the host is a live shmem inode.
        unsafe { bindings::devanon_shmem_pages(self.host(), &mut resident, &mut swapped) };
        PageCounts { resident, swapped }
    }

    /// The size of the file in bytes.
    pub(crate) fn size(&self) -> u64 {
        // SAFETY: The host is a live inode. `i_size` is one word (see the assertion above), so this
        // reads a value that it had at some moment.
        unsafe { (&raw const (*self.host()).i_size).read_volatile() as u64 }
    }
}

/// `invalidate_lock` held for writing.
///
/// # Invariants
///
/// The current task holds the lock until the guard is dropped.
pub(crate) struct InvalidateGuard<'a>(&'a Mapping, NotThreadSafe);

impl InvalidateGuard<'_> {
    pub(super) fn mapping(&self) -> &Mapping {
        self.0
    }
}

impl Drop for InvalidateGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this task holds the lock for writing.
        unsafe { bindings::up_write(self.0.invalidate_sem()) };
    }
}

/// `invalidate_lock` held shared.
///
/// # Invariants
///
/// The current task holds the lock until the guard is dropped.
pub(crate) struct SharedInvalidateGuard<'a>(&'a Mapping, NotThreadSafe);

impl Drop for SharedInvalidateGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this task holds the lock shared.
        unsafe { bindings::up_read(self.0.invalidate_sem()) };
    }
}
