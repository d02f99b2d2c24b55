// SPDX-License-Identifier: GPL-2.0

//! Freeing the pages of a shmem file that no VMA covers.
//!
//! The unsafe side (`rust/` out of tree): lookups and removal are calls of `helpers.c` and shmem on
//! raw pointers. Which range to free is decided by the safe side.
//!
//! Lock order: see [`super::mapping`].
//!
//! C header: [`include/linux/shmem_fs.h`](srctree/include/linux/shmem_fs.h).

use super::{
    bindings,
    mapping::{
        InvalidateGuard,
        Mapping, //
    },
    range::{
        Coverage,
        PageRange, //
    }, //
};
use kernel::page::PAGE_SHIFT;

/// Frees pages of one file.
///
/// # Invariants
///
/// `invalidate_lock` of the mapping is held for writing for `'a`.
pub(crate) struct PageFreer<'a>(&'a Mapping);

/// What [`PageFreer::find`] looks for.
enum Wanted {
    /// A page in memory or in swap.
    AnyPage,
    /// A page in swap.
    SwappedPage,
}

impl<'a> PageFreer<'a> {
    /// Prepares to free pages of the file whose `invalidate_lock` is held. Frees nothing yet.
    pub(crate) fn new(guard: &'a InvalidateGuard<'a>) -> Self {
        // INVARIANT: The guard is borrowed for `'a`.
        Self(guard.mapping())
    }

    /// The first page of `range` that is in memory or in swap. Does not sleep.
    pub(crate) fn next_page(&self, range: PageRange) -> Option<usize> {
        self.find(Wanted::AnyPage, range)
    }

    fn is_swapped(&self, page: usize) -> bool {
        self.find(Wanted::SwappedPage, PageRange::aligned(page, 0))
            .is_some()
    }

    fn find(&self, wanted: Wanted, range: PageRange) -> Option<usize> {
        let swapped = matches!(wanted, Wanted::SwappedPage);
        let mut page = range.first();

        // SAFETY: The mapping is live, and the result is ours to write.
        let found = unsafe {
            bindings::devanon_next_page(self.0.as_ptr(), swapped, &mut page, range.last())
        };
        found.then_some(page)
    }

    /// The coverage, by VMAs of any process, of the first page of `range`, and the last page of
    /// `range` up to which it is known to be the same.
    ///
    /// May sleep: takes `i_mmap_rwsem` for reading.
    pub(crate) fn coverage(&self, range: PageRange) -> Coverage {
        self.coverage_to(range, range.last())
    }

    /// As [`Self::coverage`], but follows an uncovered run beyond `range`, by at most 1 GiB: faults
    /// wait while the caller frees it.
    pub(crate) fn coverage_beyond(&self, range: PageRange) -> Coverage {
        const MAX_BEYOND: usize = 1 << (30 - PAGE_SHIFT);

        self.coverage_to(range, range.last().saturating_add(MAX_BEYOND))
    }

    fn coverage_to(&self, range: PageRange, mut last: usize) -> Coverage {
        // SAFETY: The mapping is live, and the result is ours to write. No spinlock is held, and
        // neither is `i_mmap_rwsem`.
        let covered = unsafe {
            bindings::devanon_covered(self.0.as_ptr(), range.first(), range.last(), &mut last)
        };
        Coverage { covered, last }
    }

    /// The pages of the folio or swap entry that contains `page`; `page` alone if there is neither.
    /// A hint: the answer may be out of date at once.
    fn folio_of(&self, page: usize) -> PageRange {
        // SAFETY: `i_pages` lives in the mapping; `xa_get_order()` does its own locking.
        let order = unsafe { bindings::xa_get_order(&raw mut (*self.0.as_ptr()).i_pages, page) };
        PageRange::aligned(page, order as u32)
    }

    /// `range`, widened at both ends to whole folios and swap entries. Does not sleep.
    pub(crate) fn widen_to_folios(&self, range: PageRange) -> PageRange {
        range
            .hull(self.folio_of(range.first()))
            .hull(self.folio_of(range.last()))
    }

    /// Frees the pages of `range`, in memory and in swap, that no VMA covers when their turn comes.
    /// A later touch finds zeros.
    ///
    /// Leaves folios that are only partly in `range` or only partly covered, and swap entries that
    /// are only partly in `range`. Returns true if it left any.
    ///
    /// May sleep: waits for folio locks. The caller must call [`super::shmem::ShmemFile::recount`]
    /// afterwards.
    ///
    /// Folios and swap entries are visited in one ascending walk, so a page that is swapped out or
    /// in meanwhile does not slip past it.
    pub(crate) fn free_contained(&self, range: PageRange) -> bool {
        let mut straddling = false;
        let mut rest = Some(range);

        while let Some(part) = rest {
            let mut page = part.first();

            // SAFETY: The mapping is live, and the results are ours to write. No spinlock is held,
            // and neither is `i_mmap_rwsem`.
            let swapped = unsafe {
                bindings::devanon_remove_uncovered(
                    self.0.as_ptr(),
                    &mut page,
                    part.last(),
                    &mut straddling,
                )
            };
            rest = PageRange::new(page, part.last()).filter(|_| swapped);
            let Some(part) = rest else { break };

            let entry = self.folio_of(page);
            rest = if range.contains(entry) {
                self.free_swapped(part)
            } else {
                straddling = true;
                part.after(entry.last())
            };
        }
        straddling
    }

    /// Frees a run of uncovered swapped pages from the first page of `part`, which is in swap.
    /// Frees nothing if a VMA covers that page. Returns the rest of `part`, still to be visited.
    fn free_swapped(&self, part: PageRange) -> Option<PageRange> {
        /// The most pages to free per lookup in the tree of VMAs: the tree is not rechecked while
        /// they are freed. The largest swap entry has as many, and is to be freed whole.
        const MAX_PER_LOOKUP: usize = 512;

        let page = part.first();
        let Coverage { covered, mut last } = self.coverage(part);

        // With faults shut out, a swapped page stays in swap, unless a read(2), a write(2), a
        // collapse or a swapoff(2) brings it in.
        if !covered {
            last = self.last_swapped(part, last.min(page.saturating_add(MAX_PER_LOOKUP - 1)));
            if let Some(swapped) = PageRange::new(page, last) {
                self.truncate(swapped);
            }
            // The page may have been brought in. Then the caller has to visit its folio.
            if !self.is_swapped(page) {
                return Some(part);
            }
        }
        part.after(last)
    }

    /// As [`Self::free_contained`], but also frees the parts in `range` of folios and swap entries
    /// that straddle its edges. Splits such a folio, or zeroes the part if that fails.
    pub(crate) fn free_splitting(&self, range: PageRange) {
        // Twice if need be: khugepaged may make a new folio across an edge meanwhile.
        for _ in 0..2 {
            let edges = [Some(range.first()), range.last().checked_add(1)];
            for edge in edges.into_iter().flatten() {
                if self.folio_of(edge).first() < edge {
                    self.split(edge);
                }
            }
            if !self.free_contained(range) {
                return;
            }
        }
        // A pinned folio cannot be split. Zero its part.
        for part in self.straddling_parts(range) {
            self.truncate(part);
        }
    }

    /// The parts of `range` that belong to folios or swap entries that straddle its edges.
    fn straddling_parts(&self, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        [range.first(), range.last()]
            .into_iter()
            .map(|page| self.folio_of(page))
            .filter(move |folio| !range.contains(*folio))
            .filter_map(move |folio| range.intersection(folio))
    }

    /// The last page, at most `last`, of the adjacent swap entries that begin with the one at the
    /// first page of `part`. Only that one may be cut by `last`, because shmem reads an entry back
    /// to cut it.
    fn last_swapped(&self, part: PageRange, last: usize) -> usize {
        let mut end = self.folio_of(part.first()).last().min(last);
        while end < last && self.is_swapped(end + 1) {
            let next = self.folio_of(end + 1).last();
            if next > last {
                break;
            }
            end = next;
        }
        end
    }

    /// Splits the folio that straddles the start of `page`, if possible. Its data stays.
    fn split(&self, page: usize) {
        // shmem splits a folio that a range begins in the middle of, and an empty range frees
        // nothing.
        self.truncate_bytes(page << PAGE_SHIFT, (page << PAGE_SHIFT) - 1);
    }

    /// Frees the pages of `range`, or zeroes those in a pinned folio that cannot be split.
    fn truncate(&self, range: PageRange) {
        self.truncate_bytes(
            range.first() << PAGE_SHIFT,
            ((range.last() + 1) << PAGE_SHIFT).wrapping_sub(1),
        );
    }

    /// `shmem_truncate_range()` from byte `first` to byte `last`.
    fn truncate_bytes(&self, first: usize, last: usize) {
        // SAFETY: By the type invariant of `Mapping` the host is a live shmem inode. No spinlock is
        // held: `invalidate_lock` is a sleeping lock. `i_mmap_rwsem` and `i_rwsem` are not held.
        unsafe {
            bindings::shmem_truncate_range(self.0.host(), first as bindings::loff_t, last as u64)
        };
    }
}
