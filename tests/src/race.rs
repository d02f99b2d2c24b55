// SPDX-License-Identifier: GPL-2.0

//! Processes and threads map, touch, write and verify pages that others unmap at the same time.
//!
//! Every worker has a word of its own in every page. It maps some pages, writes its word, and as
//! long as it has them mapped its word must stay: this is what fails if a page is freed after
//! somebody mapped and touched it. When all are gone, so must be every page.

use crate::sys::*;
use anyhow::{Context, Result, bail, ensure};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Few pages, so that workers meet.
const PAGES: usize = 8;
const THREADS: usize = 2;

fn work(fd: &OwnedFd, worker: usize, seed: u64, until: Instant) -> Result<u64> {
    let mut rng = fastrand::Rng::with_seed(seed ^ worker as u64);
    let mut rounds = 0;

    while Instant::now() < until {
        let first = rng.usize(..PAGES);
        let pages = rng.usize(1..=PAGES - first);
        let map = Map::shared(fd, pages, first)?;
        let tag = rng.u64(1..);

        if rng.bool() {
            // Brings in, or finds, pages by reading first: this is where `map_pages` is at work.
            map.read(rng.usize(..pages));
        }
        for _ in 0..rng.usize(1..4) {
            for page in 0..pages {
                // SAFETY: Inside the mapping, and nobody else's word.
                unsafe { map.word(page, 1 + worker).write_volatile(tag + page as u64) };
            }
            if rng.u8(..8) == 0 {
                std::thread::yield_now();
            }
            for page in 0..pages {
                // SAFETY: As above.
                let found = unsafe { map.word(page, 1 + worker).read_volatile() };
                ensure!(
                    found == tag + page as u64,
                    "page {}: worker {worker} wrote {:#x} and found {found:#x}",
                    first + page,
                    tag + page as u64
                );
            }
        }
        match rng.u8(..10) {
            // Page by page, in the wrong order.
            0 => (0..pages).rev().try_for_each(|page| map.part(page, 1).unmap())?,
            1 => map.cover_anonymous()?.unmap()?,
            2 => {
                let place = Map::reserve(pages)?;
                map.remap(pages, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, place.addr)?.unmap()?;
            }
            3 => {
                // Swapped out while others unmap it.
                map.advise(libc::MADV_PAGEOUT)?;
                map.unmap()?;
            }
            _ => map.unmap()?,
        }
        rounds += 1;
    }
    Ok(rounds)
}

/// Runs the race for `seconds` with `processes` processes on each of the two doors.
pub fn run(seconds: u64, processes: usize) -> Result<()> {
    let seed = fastrand::u64(..);
    println!("# seed {seed}");
    for (door, fd) in [("the device", device()?), ("a file of the ioctl", ioctl_file(PAGES)?)] {
        let until = Instant::now() + Duration::from_secs(seconds).div_f64(2.0);
        let peers = (0..processes)
            .map(|process| {
                fork(|_| {
                    let rounds = std::thread::scope(|scope| {
                        let threads: Vec<_> = (0..THREADS)
                            .map(|thread| {
                                let fd = &fd;
                                scope.spawn(move || work(fd, process * THREADS + thread, seed, until))
                            })
                            .collect();
                        threads
                            .into_iter()
                            .map(|thread| thread.join().expect("a worker panicked"))
                            .sum::<Result<u64>>()
                    })?;
                    ensure!(rounds > 100, "{rounds} rounds only");
                    println!("# {door}: process {process}: {rounds} rounds");
                    Ok(())
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let results: Vec<_> = peers.into_iter().map(Peer::join).collect();
        results
            .into_iter()
            .collect::<Result<Vec<()>>>()
            .with_context(|| format!("{door}, seed {seed}"))?;

        let left = info(&fd)?;
        if (left.resident, left.swapped) != (0, 0) {
            bail!("{door}: all unmapped, and yet {left:?}");
        }
        ensure!(left.freed > 0, "{door}: nothing was ever freed");
    }
    Ok(())
}
