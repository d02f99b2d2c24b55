// SPDX-License-Identifier: GPL-2.0

//! The driver's pure logic, held against the obvious way to do it: a bit for each page.

#[cfg(test)]
#[path = "../../../drivers/range.rs"]
mod range;

#[cfg(test)]
mod tests {
    use super::range::{PageRange, uncovered};

    const PAGES: usize = 6;

    fn all_ranges() -> Vec<PageRange> {
        (0..PAGES)
            .flat_map(|first| (first..PAGES).filter_map(move |last| PageRange::new(first, last)))
            .collect()
    }

    /// As `vma_interval_tree_iter_first()`: of those that share a page with `range`, the lowest.
    fn first_of(vmas: &[PageRange], range: PageRange) -> Option<PageRange> {
        vmas.iter()
            .filter(|vma| vma.first() <= range.last() && range.first() <= vma.last())
            .min_by_key(|vma| vma.first())
            .copied()
    }

    fn gaps(range: PageRange, vmas: &[PageRange]) -> Vec<PageRange> {
        uncovered(range, |todo| first_of(vmas, todo)).collect()
    }

    /// Every range, against every set of up to three VMAs, overlapping or not.
    #[test]
    fn uncovered_is_what_no_vma_covers() {
        let ranges = all_ranges();
        let mut sets = vec![vec![]];
        for a in &ranges {
            sets.push(vec![*a]);
            for b in &ranges {
                sets.push(vec![*a, *b]);
                for c in &ranges {
                    sets.push(vec![*a, *b, *c]);
                }
            }
        }

        for vmas in &sets {
            for &range in &ranges {
                let gaps = gaps(range, vmas);
                let mut free = [false; PAGES];
                for gap in &gaps {
                    for free in &mut free[gap.first()..=gap.last()] {
                        assert!(!*free, "twice: {range:?} less {vmas:?}: {gaps:?}");
                        *free = true;
                    }
                }
                for (page, &free) in free.iter().enumerate() {
                    let inside = (range.first()..=range.last()).contains(&page);
                    let covered = vmas
                        .iter()
                        .any(|vma| (vma.first()..=vma.last()).contains(&page));
                    assert_eq!(
                        free,
                        inside && !covered,
                        "{range:?} less {vmas:?}: {gaps:?}"
                    );
                }
                assert!(
                    gaps.windows(2)
                        .all(|pair| pair[0].last() + 1 < pair[1].first()),
                    "not ascending, or cut in two: {gaps:?}"
                );
            }
        }
    }

    #[test]
    fn the_end_of_the_world_does_not_wrap() {
        let all = PageRange::new(0, usize::MAX).unwrap();
        let top = PageRange::new(10, usize::MAX).unwrap();

        assert_eq!(gaps(all, &[top]), [PageRange::new(0, 9).unwrap()]);
        assert_eq!(gaps(all, &[all]), []);
        assert_eq!(gaps(all, &[]), [all]);
    }

    #[test]
    fn ranges_are_not_empty() {
        assert_eq!(PageRange::new(3, 2), None);
        assert!(PageRange::new(3, 3).is_some());
    }

    #[test]
    fn aligned_runs() {
        assert_eq!(PageRange::aligned(5, 0), PageRange::new(5, 5).unwrap());
        assert_eq!(PageRange::aligned(5, 2), PageRange::new(4, 7).unwrap());
        assert_eq!(
            PageRange::aligned(1023, 9),
            PageRange::new(512, 1023).unwrap()
        );
    }

    #[test]
    fn hull_holds_both() {
        for a in all_ranges() {
            for b in all_ranges() {
                let hull = a.hull(b);
                assert_eq!(hull.first(), a.first().min(b.first()));
                assert_eq!(hull.last(), a.last().max(b.last()));
            }
        }
    }
}
