// SPDX-License-Identifier: GPL-2.0

//! The driver's pure logic, held against the obvious way to do it: a bit for each page.

#[cfg(test)]
#[path = "../../../drivers/range.rs"]
#[rustfmt::skip] // It is formatted as the kernel is.
mod range;

#[cfg(test)]
mod tests {
    use super::range::{PageRange, Run, to_free};

    const PAGES: usize = 6;

    fn all_ranges() -> Vec<PageRange> {
        (0..PAGES)
            .flat_map(|first| (first..PAGES).filter_map(move |last| PageRange::new(first, last)))
            .collect()
    }

    fn has(set: usize, page: usize) -> bool {
        (set >> page) & 1 != 0
    }

    /// Every range, every set of pages that are there, every set of pages that are covered, and
    /// knowledge of runs that reaches one page, two, or as far as it holds.
    #[test]
    fn frees_what_is_there_and_not_covered() {
        for range in all_ranges() {
            for there in 0..1 << PAGES {
                for covered in 0..1 << PAGES {
                    for reach in [1, 2, PAGES] {
                        check(range, there, covered, reach);
                    }
                }
            }
        }
    }

    fn check(range: PageRange, there: usize, covered: usize, reach: usize) {
        let mut asked = 0;
        let parts: Vec<_> = to_free(
            range,
            |part| (part.first()..=part.last()).find(|page| has(there, *page)),
            |part| {
                asked += 1;
                let first = has(covered, part.first());
                let last = (part.first()..=part.last())
                    .take(reach)
                    .take_while(|page| has(covered, *page) == first)
                    .last();
                Run {
                    covered: first,
                    last: last.unwrap_or(part.first()),
                }
            },
        )
        .collect();

        let what = format!("{range:?}, there {there:b}, covered {covered:b}: {parts:?}");
        for page in 0..PAGES {
            let freed = parts
                .iter()
                .filter(|part| (part.first()..=part.last()).contains(&page))
                .count();
            let inside = (range.first()..=range.last()).contains(&page);
            assert!(freed <= 1, "page {page} twice: {what}");
            if freed == 1 {
                assert!(inside && !has(covered, page), "page {page} freed: {what}");
            } else {
                assert!(
                    !inside || has(covered, page) || !has(there, page),
                    "page {page} left: {what}"
                );
            }
        }
        assert!(
            parts
                .windows(2)
                .all(|pair| pair[0].last() < pair[1].first()),
            "order: {what}"
        );
        // Each question is about a page that is there, and none is asked twice.
        assert!(
            asked <= there.count_ones() as usize,
            "{asked} questions: {what}"
        );
    }

    #[test]
    fn the_end_of_the_world_does_not_wrap() {
        let all = PageRange::new(0, usize::MAX).unwrap();
        let free = |covered| {
            to_free(
                all,
                |part| Some(part.first()),
                move |part| Run {
                    covered,
                    last: part.last(),
                },
            )
            .collect::<Vec<_>>()
        };

        assert_eq!(free(false), [all]);
        assert_eq!(free(true), []);
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
    fn two_ranges() {
        for a in all_ranges() {
            for b in all_ranges() {
                let hull = a.hull(b);
                assert!(hull.contains(a) && hull.contains(b));
                assert_eq!(hull.first(), a.first().min(b.first()));
                assert_eq!(hull.last(), a.last().max(b.last()));
                let common: Vec<_> = (0..PAGES)
                    .filter(|page| {
                        [a, b]
                            .iter()
                            .all(|range| (range.first()..=range.last()).contains(page))
                    })
                    .collect();
                assert_eq!(
                    a.intersection(b).map(|range| range.first()),
                    common.first().copied()
                );
                assert_eq!(
                    a.intersection(b).map(|range| range.last()),
                    common.last().copied()
                );
                assert_eq!(a.contains(b), a.intersection(b) == Some(b));
            }
        }
    }
}
