// SPDX-License-Identifier: GPL-2.0

//! Ranges of pages, and which parts of a range to free.
//!
//! The safe side (`drivers/` out of tree): pure arithmetic. Nothing here calls the kernel.

/// The pages of a file from `first` to `last` inclusive, as page offsets (`pgoff_t`).
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

    /// The smallest range that contains both.
    pub(crate) fn hull(self, other: Self) -> Self {
        // INVARIANT: `first` is at most `self.first`, and `last` at least `self.last`.
        Self {
            first: self.first.min(other.first),
            last: self.last.max(other.last),
        }
    }

    /// The pages that are in both.
    pub(crate) fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.first.max(other.first), self.last.min(other.last))
    }

    /// The part after `page`.
    pub(crate) fn after(self, page: usize) -> Option<Self> {
        Self::new(page.checked_add(1)?, self.last)
    }

    /// Returns true if all of `other` is in this range.
    pub(crate) fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// The aligned block of `1 << order` pages that contains `page`.
    pub(crate) fn aligned(page: usize, order: u32) -> Self {
        let mask = (1 << order) - 1;

        // INVARIANT: Clearing bits never increases a number, setting bits never decreases it.
        Self {
            first: page & !mask,
            last: page | mask,
        }
    }
}

/// A run of consecutive pages with the same coverage.
pub(crate) struct Coverage {
    /// True if every page of the run is covered by a VMA, false if none is.
    pub(crate) covered: bool,
    /// The last page of the run.
    pub(crate) last: usize,
}

/// The parts of `range` to free, in ascending order. Each begins at a page that exists and that no
/// VMA covers, and ends where its uncovered run does.
///
/// `next_page` returns the first page of its argument that exists, in memory or in swap. `coverage`
/// returns the run that begins at the first page of its argument. An uncovered run may end beyond
/// `range`; its pages are then freed as well. Holes cost nothing, however many VMAs cover them.
pub(crate) fn ranges_to_free(
    range: PageRange,
    mut next_page: impl FnMut(PageRange) -> Option<usize>,
    mut coverage: impl FnMut(PageRange) -> Coverage,
) -> impl Iterator<Item = PageRange> {
    let mut rest = Some(range);

    core::iter::from_fn(move || loop {
        let todo = rest?;
        let part = PageRange::new(next_page(todo)?, todo.last)?;
        let Coverage { covered, last } = coverage(part);

        rest = todo.after(last);
        if !covered {
            return PageRange::new(part.first, last);
        }
    })
}

/// Checked against a naive bitmap model.
#[kernel::macros::kunit_tests(devanon_range)]
mod tests {
    use super::*;

    const PAGES: usize = 5;

    fn all_ranges() -> impl Iterator<Item = PageRange> {
        (0..PAGES)
            .flat_map(|first| (first..PAGES).filter_map(move |last| PageRange::new(first, last)))
    }

    fn bits(range: PageRange) -> usize {
        (range.first()..=range.last()).fold(0, |bits, page| bits | 1 << page)
    }

    fn has(set: usize, page: usize) -> bool {
        (set >> page) & 1 != 0
    }

    /// Returns true if the parts are right and in order, and took at most one lookup per existing
    /// page. A lookup reports at most `reach` pages of a run, also beyond `range` if `beyond`.
    fn is_right(
        range: PageRange,
        existing: usize,
        covered: usize,
        reach: usize,
        beyond: bool,
    ) -> bool {
        let mut lookups = 0;
        let mut freed = 0;
        let mut in_order = true;
        for part in ranges_to_free(
            range,
            |part| (part.first()..=part.last()).find(|page| has(existing, *page)),
            |part| {
                lookups += 1;
                let first = has(covered, part.first());
                let end = if beyond { PAGES } else { part.last() + 1 };
                let last = (part.first()..end)
                    .take(reach)
                    .take_while(|page| has(covered, *page) == first)
                    .last();
                Coverage {
                    covered: first,
                    last: last.unwrap_or(part.first()),
                }
            },
        ) {
            in_order &= bits(part) > freed;
            freed |= bits(part);
        }

        in_order
            && freed & covered == 0
            && (beyond || freed & !bits(range) == 0)
            && bits(range) & existing & !covered & !freed == 0
            && lookups <= existing.count_ones()
    }

    #[test]
    fn frees_existing_uncovered_pages() {
        let mut right = 0;
        for range in all_ranges() {
            for existing in 0..1 << PAGES {
                for covered in 0..1 << PAGES {
                    right += [
                        (1, false),
                        (2, false),
                        (PAGES, false),
                        (2, true),
                        (PAGES, true),
                    ]
                    .into_iter()
                    .filter(|(reach, beyond)| is_right(range, existing, covered, *reach, *beyond))
                    .count();
                }
            }
        }
        assert_eq!(right, (all_ranges().count() << (2 * PAGES)) * 5);
    }

    #[test]
    fn the_last_page_does_not_wrap() {
        let all = PageRange::aligned(0, usize::BITS - 1).hull(PageRange::aligned(usize::MAX, 0));
        let free = |covered| {
            let mut parts = ranges_to_free(
                all,
                |part| Some(part.first()),
                move |part| Coverage {
                    covered,
                    last: part.last(),
                },
            );
            (parts.next(), parts.next())
        };

        assert!(free(false) == (Some(all), None));
        assert!(free(true) == (None, None));
    }

    #[test]
    fn ranges_are_not_empty() {
        assert!(PageRange::new(3, 2).is_none());
        assert!(PageRange::new(3, 3).is_some());
    }

    #[test]
    fn aligned_blocks() {
        assert!(Some(PageRange::aligned(5, 0)) == PageRange::new(5, 5));
        assert!(Some(PageRange::aligned(5, 2)) == PageRange::new(4, 7));
        assert!(Some(PageRange::aligned(1023, 9)) == PageRange::new(512, 1023));
    }

    #[test]
    fn two_ranges() {
        for a in all_ranges() {
            for b in all_ranges() {
                let hull = a.hull(b);

                assert!(hull.contains(a) && hull.contains(b));
                assert_eq!(hull.first(), a.first().min(b.first()));
                assert_eq!(hull.last(), a.last().max(b.last()));
                assert_eq!(a.intersection(b).map_or(0, bits), bits(a) & bits(b));
                assert_eq!(a.contains(b), bits(b) & !bits(a) == 0);
            }
        }
    }
}
