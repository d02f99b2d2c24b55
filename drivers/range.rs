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

    /// What both have in common.
    pub(crate) fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.first.max(other.first), self.last.min(other.last))
    }

    /// Whether `other` lies in it.
    pub(crate) fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
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

/// Pages from one on of which the same holds.
pub(crate) struct Run {
    /// Some VMA covers each of them, or none does any of them.
    pub(crate) covered: bool,
    /// The last of them.
    pub(crate) last: usize,
}

/// The parts of `range` to free, in ascending order: from a page that is there and not covered to
/// where the next covered one is known.
///
/// `next_page` answers with the first page of its argument that is there. `run` says of the first
/// page of its argument whether it is covered, and up to which page of the argument that holds.
/// Pages that are not there cost nothing, however many VMAs cover them.
pub(crate) fn to_free(
    range: PageRange,
    mut next_page: impl FnMut(PageRange) -> Option<usize>,
    mut run: impl FnMut(PageRange) -> Run,
) -> impl Iterator<Item = PageRange> {
    let mut rest = Some(range);

    core::iter::from_fn(move || loop {
        let todo = rest?;
        let part = PageRange::new(next_page(todo)?, todo.last)?;
        let Run { covered, last } = run(part);

        rest = last
            .checked_add(1)
            .and_then(|next| PageRange::new(next, todo.last));
        if !covered {
            return PageRange::new(part.first, last);
        }
    })
}
