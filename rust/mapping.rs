// SPDX-License-Identifier: GPL-2.0

//! The page cache of a shmem file: its locks, its VMAs, its truncation.
//!
//! Lock order: `mmap_lock` -> `invalidate_lock` -> folio lock -> `i_mmap_rwsem`.
//!
//! shmem itself leaves `invalidate_lock` alone. Here it stands between freeing pages (for writing)
//! and touching them (shared). It is never taken inside `i_rwsem`'s critical section by this
//! driver, but a `write(2)` whose buffer is a mapping of the same file faults under `i_rwsem`, so
//! `i_rwsem` must not be taken under `invalidate_lock`: no `vfs_fallocate()` from here.
//!
//! C headers: [`include/linux/fs.h`](srctree/include/linux/fs.h),
//! [`include/linux/shmem_fs.h`](srctree/include/linux/shmem_fs.h).

use super::{
    bindings,
    range::PageRange, //
};
use kernel::{
    page::PAGE_SHIFT,
    types::{
        NotThreadSafe,
        Opaque, //
    }, //
};

/// A `struct address_space`, the page cache of one file.
///
/// # Invariants
///
/// The `address_space` is that of a shmem inode, embedded in it (`mapping == &host->i_data`).
#[repr(transparent)]
pub(crate) struct Mapping(Opaque<bindings::address_space>);

/// How many pages a file has.
pub(crate) struct Pages {
    /// Pages in memory.
    pub(crate) resident: usize,
    /// Pages in swap.
    pub(crate) swapped: usize,
}

impl Pages {
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

    fn host(&self) -> *mut bindings::inode {
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

    /// As [`Self::invalidate_lock_shared`], but returns [`None`] instead of sleeping.
    pub(crate) fn try_invalidate_lock_shared(&self) -> Option<SharedInvalidateGuard<'_>> {
        // SAFETY: The semaphore lives as long as `self`.
        let taken = unsafe { bindings::down_read_trylock(self.invalidate_sem()) } != 0;
        // INVARIANT: Taken by this task if `taken`.
        taken.then(|| SharedInvalidateGuard(self, NotThreadSafe))
    }

    /// The pages of the file. Takes a spinlock of shmem's; does not sleep.
    pub(crate) fn pages(&self) -> Pages {
        let (mut resident, mut swapped) = (0, 0);

        // SAFETY: By the type invariant the host is a live shmem inode.
        unsafe { bindings::devanon_shmem_pages(self.host(), &mut resident, &mut swapped) };
        Pages { resident, swapped }
    }

    /// Size of the file in bytes.
    pub(crate) fn size(&self) -> u64 {
        // SAFETY: The host is a live inode. `i_size` is one word on the 64-bit machines this is
        // built for (see Kbuild), and all that is asked of it is some value it had.
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
    /// The range of the VMA that starts lowest among those that cover a page of `range`, of any
    /// process. May sleep: takes `i_mmap_rwsem` for reading.
    pub(crate) fn first_covered(&self, range: PageRange) -> Option<PageRange> {
        let (mut first, mut last) = (0, 0);

        // SAFETY: The mapping is live, and the two results are ours to write.
        let found = unsafe {
            bindings::devanon_first_covered(
                self.0 .0.get(),
                range.first(),
                range.last(),
                &mut first,
                &mut last,
            )
        };
        if found {
            PageRange::new(first, last)
        } else {
            None
        }
    }

    /// `range`, widened at both ends to whole folios, or whole entries where they are in swap.
    ///
    /// Does not sleep.
    pub(crate) fn whole_folios(&self, range: PageRange) -> PageRange {
        let run_of = |page| {
            // SAFETY: `i_pages` lives in the mapping; `xa_get_order()` does its own locking, and
            // its answer is a hint: a folio split or made right after changes what
            // `shmem_truncate_range()` meets, which copes with any.
            let order =
                unsafe { bindings::xa_get_order(&raw mut (*self.0 .0.get()).i_pages, page) };
            PageRange::aligned(page, order as u32)
        };

        range.hull(run_of(range.first())).hull(run_of(range.last()))
    }

    /// Frees the pages of `range`, resident and swapped out; a later touch finds zeros.
    ///
    /// May sleep: waits for folio locks and for writeback.
    pub(crate) fn truncate(&self, range: PageRange) {
        let start = (range.first() << PAGE_SHIFT) as bindings::loff_t;
        let end = ((range.last() + 1) << PAGE_SHIFT).wrapping_sub(1) as u64;

        // SAFETY: By the type invariant of `Mapping` the host is a live shmem inode. No spinlock is
        // held: the guard is that of a sleeping lock. `i_mmap_rwsem` and `i_rwsem` are not held.
        unsafe { bindings::shmem_truncate_range(self.0.host(), start, end) };
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
