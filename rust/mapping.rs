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

use super::{
    bindings,
    range::{
        PageRange,
        Run, //
    }, //
};
use kernel::{
    page::PAGE_SHIFT,
    types::{
        NotThreadSafe,
        Opaque, //
    }, //
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

    /// Whether anybody has `invalidate_lock`, one way or the other. Does not sleep.
    pub(crate) fn is_invalidate_locked(&self) -> bool {
        // SAFETY: The mapping is live.
        unsafe { bindings::devanon_invalidate_locked(self.0.get()) }
    }

    /// The pages of the file. Takes no lock: what goes to swap, or comes or goes otherwise at the
    /// same moment, may be counted or not, or twice.
    pub(crate) fn pages(&self) -> Pages {
        let (mut resident, mut swapped) = (0, 0);

        // SAFETY: By the type invariant the host is a live shmem inode.
        unsafe { bindings::devanon_shmem_pages(self.host(), &mut resident, &mut swapped) };
        Pages { resident, swapped }
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
    /// The first page of `range` that is in memory or in swap. Does not sleep.
    pub(crate) fn next_page(&self, range: PageRange) -> Option<usize> {
        self.next(false, range)
    }

    fn next(&self, swapped: bool, range: PageRange) -> Option<usize> {
        let mut page = range.first();

        // SAFETY: The mapping is live, and the result is ours to write.
        let found = unsafe {
            bindings::devanon_next_page(self.0 .0.get(), swapped, &mut page, range.last())
        };
        found.then_some(page)
    }

    /// Whether a VMA, of any process, covers the first page of `range`, and up to which page of it
    /// the same holds. May sleep: takes `i_mmap_rwsem` for reading.
    pub(crate) fn run(&self, range: PageRange) -> Run {
        self.run_within(range, range.last())
    }

    /// As [`Self::run`], but pages that are not covered are followed beyond `range`, for a while:
    /// the caller shuts out faults as long as it frees them.
    pub(crate) fn run_beyond(&self, range: PageRange) -> Run {
        const FURTHER: usize = 1 << (30 - PAGE_SHIFT);

        self.run_within(range, range.last().saturating_add(FURTHER))
    }

    fn run_within(&self, range: PageRange, mut last: usize) -> Run {
        // SAFETY: The mapping is live, and the result is ours to write. No spinlock is held, and
        // neither is `i_mmap_rwsem`.
        let covered = unsafe {
            bindings::devanon_covered(self.0 .0.get(), range.first(), range.last(), &mut last)
        };
        Run { covered, last }
    }

    /// The pages of the folio that has `page`, or of the entry where they are in swap, or `page`
    /// alone. A hint: it may change at once.
    fn folio_of(&self, page: usize) -> PageRange {
        // SAFETY: `i_pages` lives in the mapping; `xa_get_order()` does its own locking.
        let order = unsafe { bindings::xa_get_order(&raw mut (*self.0 .0.get()).i_pages, page) };
        PageRange::aligned(page, order as u32)
    }

    /// `range`, widened at both ends to whole folios. Does not sleep.
    pub(crate) fn whole_folios(&self, range: PageRange) -> PageRange {
        range
            .hull(self.folio_of(range.first()))
            .hull(self.folio_of(range.last()))
    }

    /// Frees the pages of `range`, in memory and in swap, but none that a VMA covers by the time it
    /// is their turn. A later touch finds zeros. Leaves folios, and entries in swap, that reach
    /// beyond `range`; whether there were none.
    ///
    /// May sleep: waits for folio locks. [`super::shmem::ShmemFile::recount`] is to follow.
    ///
    /// Page by page in ascending order: a page may go to swap or come back from there meanwhile,
    /// but neither way gets it past the place that is looked at.
    pub(crate) fn free_whole(&self, range: PageRange) -> bool {
        let mut whole = true;
        let mut rest = Some(range);

        while let Some(part) = rest {
            let mut page = part.first();

            // SAFETY: The mapping is live, and the results are ours to write. No spinlock is held,
            // and neither is `i_mmap_rwsem`.
            let swapped = unsafe {
                bindings::devanon_remove_uncovered(
                    self.0 .0.get(),
                    &mut page,
                    part.last(),
                    &mut whole,
                )
            };
            rest = PageRange::new(page, part.last()).filter(|_| swapped);
            let Some(part) = rest else { break };

            let entry = self.folio_of(page);
            rest = if range.contains(entry) {
                self.free_swapped(part)
            } else {
                whole = false;
                part.after(entry.last())
            };
        }
        whole
    }

    /// Frees pages from the first one of `part` on, which is in swap, if no VMA covers it: what of
    /// `part` is left to look at.
    fn free_swapped(&self, part: PageRange) -> Option<PageRange> {
        /// The tree of VMAs is asked again after so many pages at most, as it is not while they are
        /// freed. As many as the largest entry has, which is to be freed whole.
        const AT_ONCE: usize = 512;

        let page = part.first();
        let Run { covered, mut last } = self.run(part);

        // With faults shut out, what is in swap stays there, short of a read(2), a write(2), a
        // collapse or a swapoff(2).
        if !covered {
            last = self.last_swapped(part, last.min(page.saturating_add(AT_ONCE - 1)));
            if let Some(swapped) = PageRange::new(page, last) {
                self.truncate(swapped);
            }
            // It may have become a folio, or a part of one.
            if self.next(true, PageRange::aligned(page, 0)).is_none() {
                return Some(part);
            }
        }
        part.after(last)
    }

    /// As [`Self::free_whole`], but splits what reaches beyond `range`, or zeroes its part.
    pub(crate) fn free(&self, range: PageRange) {
        // Twice, if need be: a folio across an edge may be one that khugepaged made meanwhile.
        for _ in 0..2 {
            let edges = [Some(range.first()), range.last().checked_add(1)];
            for edge in edges.into_iter().flatten() {
                if self.folio_of(edge).first() < edge {
                    self.split(edge);
                }
            }
            if self.free_whole(range) {
                return;
            }
        }
        // What could not be split, as it is pinned: its part is zeroed.
        for part in self.straddlers(range) {
            self.truncate(part);
        }
    }

    /// The parts of `range` that belong to folios, or entries in swap, that reach beyond it.
    fn straddlers(&self, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        [range.first(), range.last()]
            .into_iter()
            .map(|page| self.folio_of(page))
            .filter(move |folio| !range.contains(*folio))
            .filter_map(move |folio| range.intersection(folio))
    }

    /// The last page of `part`, up to `last`, such that no folio lies between. Only the first entry
    /// may be cut, as shmem reads it back for that.
    fn last_swapped(&self, part: PageRange, last: usize) -> usize {
        let mut end = self.folio_of(part.first()).last().min(last);
        while end < last && self.next(true, PageRange::aligned(end + 1, 0)).is_some() {
            let next = self.folio_of(end + 1).last();
            if next > last {
                break;
            }
            end = next;
        }
        end
    }

    /// Splits the folio across the border before `page`, if it can be split. Its data stays.
    fn split(&self, page: usize) {
        // shmem splits what a range begins in the middle of, and an empty range frees nothing.
        self.truncate_bytes(page << PAGE_SHIFT, (page << PAGE_SHIFT) - 1);
    }

    /// Frees, or zeroes where a pinned folio cannot be split, the pages of `range`.
    fn truncate(&self, range: PageRange) {
        self.truncate_bytes(
            range.first() << PAGE_SHIFT,
            ((range.last() + 1) << PAGE_SHIFT).wrapping_sub(1),
        );
    }

    /// `shmem_truncate_range()` from byte `first` to byte `last`.
    fn truncate_bytes(&self, first: usize, last: usize) {
        // SAFETY: By the type invariant of `Mapping` the host is a live shmem inode. No spinlock is
        // held: the guard is that of a sleeping lock. `i_mmap_rwsem` and `i_rwsem` are not held.
        unsafe {
            bindings::shmem_truncate_range(self.0.host(), first as bindings::loff_t, last as u64)
        };
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
