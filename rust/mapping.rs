// SPDX-License-Identifier: GPL-2.0

//! The page cache of a shmem file: its locks, its VMAs, the removal of its pages.
//!
//! Lock order: `mmap_lock` -> `invalidate_lock` -> folio lock -> `i_mmap_rwsem`.
//!
//! shmem itself leaves `invalidate_lock` alone. Here it stands between freeing pages (for writing)
//! and bringing them in by faults (shared, by those that find it taken). This driver never takes it
//! inside `i_rwsem`'s critical section, but a `write(2)` whose buffer is a mapping of the same file
//! faults under `i_rwsem`, so `i_rwsem` must not be taken under `invalidate_lock`: no
//! `vfs_fallocate()` from here.
//!
//! C headers: [`include/linux/fs.h`](srctree/include/linux/fs.h),
//! [`include/linux/shmem_fs.h`](srctree/include/linux/shmem_fs.h).

use super::bindings;
use kernel::types::{
    NotThreadSafe,
    Opaque, //
};

// Offsets in bytes are `usize` here, and `i_size` is read without its seqcount.
const _: () = assert!(usize::BITS == 64);

/// A `struct address_space`, the page cache of one file.
///
/// # Invariants
///
/// The `address_space` is that of a shmem inode, embedded in it (`mapping == &host->i_data`).
#[repr(transparent)]
pub(crate) struct Mapping(Opaque<bindings::address_space>);

/// How many pages a file has.
#[derive(Default)]
pub(crate) struct PageCounts {
    /// Pages in memory.
    pub(crate) resident: usize,
    /// Pages in swap.
    pub(crate) swapped: usize,
}

impl PageCounts {
    /// Both kinds.
    pub(crate) fn total(&self) -> usize {
        self.resident + self.swapped
    }
}

impl Mapping {
    /// # Safety
    ///
    /// `ptr` is the `i_mapping` of a shmem inode, which lives for `'a`.
    pub(super) unsafe fn from_raw<'a>(ptr: *mut bindings::address_space) -> &'a Self {
        // SAFETY: `Self` is transparent over an `Opaque`, and the caller vouches for the pointee.
        // INVARIANT: So does the caller for the inode; shmem never redirects `i_mapping`.
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
        // SAFETY: The projection stays inside the live address space.
        unsafe { &raw mut (*self.0.get()).invalidate_lock }
    }

    /// Shuts out every fault of every mapping of this file. May sleep.
    pub(crate) fn invalidate_lock(&self) -> InvalidateGuard<'_> {
        // SAFETY: The semaphore lives as long as `self`.
        unsafe { bindings::down_write(self.invalidate_sem()) };
        // INVARIANT: Just taken, by this task.
        InvalidateGuard(self, NotThreadSafe)
    }

    /// Shuts out the freeing of pages. May sleep.
    pub(crate) fn invalidate_lock_shared(&self) -> SharedInvalidateGuard<'_> {
        // SAFETY: The semaphore lives as long as `self`.
        unsafe { bindings::down_read(self.invalidate_sem()) };
        // INVARIANT: Just taken, by this task.
        SharedInvalidateGuard(self, NotThreadSafe)
    }

    /// Whether anybody has `invalidate_lock`, one way or the other. Does not sleep.
    pub(crate) fn is_invalidate_locked(&self) -> bool {
        // SAFETY: The mapping is live.
        unsafe { bindings::devanon_invalidate_locked(self.0.get()) }
    }

    /// The pages of the file. Takes no lock: what goes to swap, or comes or goes otherwise at the
    /// same moment, may be counted or not, or twice.
    pub(crate) fn page_counts(&self) -> PageCounts {
        let (mut resident, mut swapped) = (0, 0);

        // SAFETY: By the type invariant the host is a live shmem inode.
        unsafe { bindings::devanon_shmem_pages(self.host(), &mut resident, &mut swapped) };
        PageCounts { resident, swapped }
    }

    /// Size of the file in bytes.
    pub(crate) fn size(&self) -> u64 {
        // SAFETY: The host is a live inode. `i_size` is one word, as offsets in bytes are (see
        // above), and all that is asked of it is some value it had.
        unsafe { (&raw const (*self.host()).i_size).read_volatile() as u64 }
    }
}

/// `invalidate_lock` held for writing.
///
/// # Invariants
///
/// The current task holds it, and gives it back when this is dropped.
pub(crate) struct InvalidateGuard<'a>(&'a Mapping, NotThreadSafe);

impl InvalidateGuard<'_> {
    pub(super) fn mapping(&self) -> &Mapping {
        self.0
    }
}

impl Drop for InvalidateGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this task holds it for writing.
        unsafe { bindings::up_write(self.0.invalidate_sem()) };
    }
}

/// `invalidate_lock` held shared.
///
/// # Invariants
///
/// The current task holds it, and gives it back when this is dropped.
pub(crate) struct SharedInvalidateGuard<'a>(&'a Mapping, NotThreadSafe);

impl Drop for SharedInvalidateGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this task holds it shared.
        unsafe { bindings::up_read(self.0.invalidate_sem()) };
    }
}
