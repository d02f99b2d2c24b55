// SPDX-License-Identifier: GPL-2.0

//! Ranges of pages, and what of one is left uncovered.
//!
//! Nothing here calls the kernel, so `cargo test` runs it as well (`tests/range`).

/// Pages `first` to `last` of a file, both included, as page offsets (`pgoff_t`).
///
/// # Invariants
///
/// `first <= last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRange {
    first: usize,
    last: usize,
}

impl PageRange {
    /// Returns [`None`] unless `first <= last`.
    pub(crate) fn new(first: usize, last: usize) -> Option<Self> {
        // INVARIANT: Just checked.
        (first <= last).then_some(Self { first, last })
    }

    /// The first page.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// The last page.
    pub(crate) fn last(&self) -> usize {
        self.last
    }

    /// The smallest range that holds both.
    pub(crate) fn hull(self, other: Self) -> Self {
        // INVARIANT: `min(a, b) <= a <= c <= max(c, d)`.
        Self {
            first: self.first.min(other.first),
            last: self.last.max(other.last),
        }
    }

    /// The aligned run of `1 << order` pages that holds `page`.
    pub(crate) fn aligned(page: usize, order: u32) -> Self {
        let mask = (1 << order) - 1;

        // INVARIANT: Clearing bits does not raise a number, setting them does not lower it.
        Self {
            first: page & !mask,
            last: page | mask,
        }
    }
}

/// The parts of `range` that `first_covered` does not cover, in ascending order.
///
/// `first_covered` is asked for the covered range that starts lowest among those that share a page
/// with its argument, as `vma_interval_tree_iter_first()` answers. It is asked once for every such
/// range and once more, and only when the iterator is advanced.
pub(crate) fn uncovered(
    range: PageRange,
    mut first_covered: impl FnMut(PageRange) -> Option<PageRange>,
) -> impl Iterator<Item = PageRange> {
    let mut rest = Some(range);

    core::iter::from_fn(move || {
        while let Some(todo) = rest {
            let Some(covered) = first_covered(todo) else {
                rest = None;
                return Some(todo);
            };

            rest = covered
                .last
                .checked_add(1)
                .and_then(|next| PageRange::new(next, todo.last));
            if covered.first > todo.first {
                return PageRange::new(todo.first, covered.first - 1);
            }
        }
        None
    })
}
