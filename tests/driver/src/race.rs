// SPDX-License-Identifier: GPL-2.0

//! Processes and threads map, touch, write and verify pages that others unmap at the same time:
//! first in [`duels`] between all relevant pairs of operations, then in a melee.
//!
//! Every worker owns a word in every page. It maps some pages and writes its word, which must stay
//! for as long as the worker has the page mapped. If a page is freed after somebody mapped and
//! touched it, this check fails. Once all workers are gone, every page must be freed.
//!
//! MADV_COLLAPSE maps pages without calling `fault` or `map_pages`, so it has a race test of its own.
//!
//! Freeing many pages takes a while. So one process repeatedly maps all pages, brings them in and
//! unmaps them, while the others map a few of them.

mod duels;

use crate::sys::*;
use anyhow::{Context, Result, ensure};
use duels::{PageMode, duels};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const PAGES: usize = 1024;
/// Threads of each process that maps a few pages. Threads of one process serialize in mmap(2).
const THREADS: usize = 2;

/// Maps all pages, brings them in, unmaps them.
fn sweep(fd: &OwnedFd, worker: usize, mode: PageMode, until: Instant) -> Result<u64> {
    let mut rounds = 0;

    // At least twice, on a machine however slow.
    while rounds < 2 || Instant::now() < until {
        let map = Map::shared(fd, PAGES, 0)?;
        map.advise(libc::MADV_POPULATE_WRITE)?;
        write_and_verify(map, worker, rounds + 1, Duration::ZERO)?;
        if mode == PageMode::SmallPagesAndSwap && rounds % 2 == 0 {
            // These pages are freed in swap while others bring them in.
            map.part(0, PAGES / 2).advise(libc::MADV_PAGEOUT)?;
        }
        map.unmap()?;
        rounds += 1;
    }
    Ok(rounds)
}

/// Maps a few pages, uses them, unmaps them.
fn probe(fd: &OwnedFd, worker: usize, seed: u64, until: Instant) -> Result<u64> {
    let mut rng = fastrand::Rng::with_seed(seed ^ worker as u64);
    let mut rounds = 0;

    while Instant::now() < until {
        let first = rng.usize(..PAGES);
        let pages = rng.usize(1..=4.min(PAGES - first));
        let map = Map::shared(fd, pages, first)?;
        if rng.bool() {
            // On a read fault, `map_pages` sets the PTEs, and the write does not fault.
            map.read(0);
        }
        write_and_verify(
            map,
            worker,
            rng.u64(1..),
            Duration::from_micros(rng.u64(..8000)),
        )?;
        match rng.u8(..10) {
            // Page by page, in descending order.
            0 => (0..pages)
                .rev()
                .try_for_each(|page| map.part(page, 1).unmap())?,
            1 => map.cover_anonymous()?.unmap()?,
            2 => {
                let place = Map::reserve(pages)?;
                map.remap(pages, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, place.addr)?
                    .unmap()?;
            }
            _ => map.unmap()?,
        }
        rounds += 1;
    }
    Ok(rounds)
}

/// Writes the worker's word into every page, and verifies it for `time`.
fn write_and_verify(map: Map, worker: usize, tag: u64, time: Duration) -> Result<()> {
    let until = Instant::now() + time;

    for page in 0..map.pages {
        // SAFETY: Inside the mapping, and nobody else's word.
        unsafe { map.word(page, 1 + worker).write_volatile(tag + page as u64) };
    }
    loop {
        for page in 0..map.pages {
            // SAFETY: As above.
            let found = unsafe { map.word(page, 1 + worker).read_volatile() };
            ensure!(
                found == tag + page as u64,
                "worker {worker} wrote {:#x} and found {found:#x}",
                tag + page as u64
            );
        }
        if Instant::now() >= until {
            return Ok(());
        }
        std::thread::yield_now();
    }
}

/// Runs the race for `seconds`: duels and a melee through each of the two doors, in each page mode.
pub fn map_touch_unmap(seed: u64, seconds: u64) -> Result<()> {
    let half = Duration::from_secs(seconds).div_f64(8.0);
    for (mode, enabled) in [
        (PageMode::SmallPagesAndSwap, "never"),
        (PageMode::HugePages, "always"),
    ] {
        for (door, has_fallocate, fd) in [
            ("the device", false, device()?),
            ("a file of the ioctl", true, ioctl_file(PAGES)?),
        ] {
            let start = Instant::now();
            let fight = || -> Result<()> {
                std::fs::write(SHMEM_ENABLED, enabled)?;
                let fought = duels(&fd, has_fallocate, mode, seed, start + half)?;
                println!("{door}, {mode:?}: {fought} duels, {:?}", start.elapsed());
                count("operations", fought);
                std::fs::write(SHMEM_ENABLED, enabled)?;
                melee(&fd, mode, seed, Instant::now() + half)
            };
            fight().with_context(|| format!("{door}, {mode:?}, seed {seed}"))?;
        }
    }
    Ok(())
}

/// All workers at once, at random.
fn melee(fd: &OwnedFd, mode: PageMode, seed: u64, until: Instant) -> Result<()> {
    let peers = (0..PROCESSES)
        .map(|process| {
            fork(|_| {
                let rounds = if process == 0 {
                    sweep(fd, 0, mode, until)?
                } else {
                    std::thread::scope(|scope| {
                        let threads: Vec<_> = (0..THREADS)
                            .map(|thread| process * THREADS + thread)
                            .map(|worker| scope.spawn(move || probe(fd, worker, seed, until)))
                            .collect();
                        threads
                            .into_iter()
                            .map(|thread| thread.join().expect("a worker panicked"))
                            .sum::<Result<u64>>()
                    })?
                };
                println!("process {process}: {rounds} rounds");
                count("operations", rounds);
                Ok(())
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let results: Vec<_> = peers.into_iter().map(Peer::join).collect();
    results.into_iter().collect::<Result<Vec<()>>>()?;

    if mode == PageMode::HugePages {
        // Partly unmapped huge pages are freed when their whole range is unmapped.
        Map::shared(fd, PAGES, 0)?.unmap()?;
    }
    expect_resident(fd, 0, "all unmapped")?;
    ensure!(info(fd)?.freed > 0, "nothing was ever freed");
    Ok(())
}

const PROCESSES: usize = 3;
const HUGE: usize = 512;
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// One process unmaps many huge pages. Meanwhile another covers the last of them, populates it with
/// MADV_COLLAPSE, which calls neither `fault` nor `map_pages`, and writes.
pub fn collapse() -> Result<()> {
    const MANY: usize = 50;
    const ROUNDS: u64 = 12;
    std::fs::write(SHMEM_ENABLED, "always")?;
    let place = Map::reserve((MANY + 1) * HUGE)?;
    let place = place.part(place.addr.align_offset(HUGE * PAGE) / PAGE, MANY * HUGE);
    let (mut collapsed, mut early) = (0, 0);

    for round in 0..ROUNDS {
        let dev = device()?;
        let mut child = fork(|peer| {
            let map = place.cover(&dev, 0)?;
            (0..MANY).for_each(|page| map.write(page * HUGE, 7));
            peer.meet()?;
            map.unmap()
        })?;
        child.meet()?;
        let wait = Instant::now() + Duration::from_micros(50 * round);
        while Instant::now() < wait {}

        let last = place
            .part((MANY - 1) * HUGE, HUGE)
            .cover(&dev, (MANY - 1) * HUGE)?;
        if last.advise(libc::MADV_COLLAPSE).is_ok() {
            collapsed += 1;
        }
        if info(&dev)?.freed == 0 {
            early += 1;
        }
        last.write(1, 0x1234);
        child.join()?;
        ensure!(
            last.read(1) == 0x1234,
            "round {round}: a live page was lost"
        );
        last.unmap()?;
        expect_resident(&dev, 0, "all unmapped")?;
    }
    println!("{collapsed} of {ROUNDS} collapsed, {early} before the close was done");
    Ok(())
}

/// One process unmaps many swapped-out pages. Meanwhile another maps the last of them, brings it in
/// and writes to it: after the closer found it uncovered and before it is freed, if a fault can get
/// in between.
pub fn fault_during_swap_freeing() -> Result<()> {
    let place = Map::reserve(PAGES)?;
    let swap_out = |dev: &OwnedFd| -> Result<Map> {
        let map = place.cover(dev, 0)?;
        map.fill(7);
        map.advise(libc::MADV_PAGEOUT)?;
        let swapped = info(dev)?.swapped;
        ensure!(swapped > PAGES / 2, "only {swapped} pages went to swap");
        Ok(map)
    };
    let dev = device()?;
    let map = swap_out(&dev)?;
    let start = Instant::now();
    map.unmap()?;
    let time = start.elapsed();

    let begun = Map::shared(&memfd(1)?, 1, 0)?;
    let start = Instant::now();
    let (mut rounds, mut early) = (0u32, 0);
    while rounds < 4 || start.elapsed() < Duration::from_secs(5) {
        let dev = device()?;
        begun.write(0, 0);
        let child = fork(|_| {
            let map = swap_out(&dev);
            begun.write(0, 1);
            map?.unmap()
        })?;
        while begun.read(0) == 0 {}
        // Spreads even a few rounds, on a slow kernel, over the whole time.
        let wait = Instant::now() + time.mul_f64(f64::from(rounds * 5 % 16) / 16.0);
        while Instant::now() < wait {}

        let last = Map::shared(&dev, 1, PAGES - 1)?;
        early += u32::from(info(&dev)?.freed == 0);
        // SAFETY: Inside the mapping; nobody else writes there.
        unsafe { last.word(0, 1).write_volatile(0x1234) };
        child.join()?;
        // SAFETY: As above.
        let found = unsafe { last.word(0, 1).read_volatile() };
        ensure!(found == 0x1234, "round {rounds}: a live page was lost");
        last.unmap()?;
        expect_resident(&dev, 0, "all unmapped")?;
        rounds += 1;
    }
    println!("{rounds} rounds of {time:?}, in {early} mapped before the close was done");
    count("operations", u64::from(rounds));
    Ok(())
}

/// One thread unmaps a huge page's worth of memory while another collapses it, for which the kernel
/// drops `mmap_lock`. The resulting huge page has lost its last mapping, and has to be freed.
pub fn collapse_during_unmap() -> Result<()> {
    const ROUNDS: u64 = 80;
    let (mut collapsed, mut at_once, mut left, mut stale) = (0, 0, 0, 0);
    let (mut round, begin) = (0, Instant::now());

    while round < ROUNDS && (round < 16 || begin.elapsed().as_secs() < 20) {
        let dev = device()?;
        let place = Map::reserve(2 * HUGE)?;
        let skip = place.addr.align_offset(HUGE * PAGE) / PAGE;
        let map = place.part(skip, HUGE).cover(&dev, 0)?;
        // A few pages only, so that most of the time is spent on the huge page they become part of.
        (0..HUGE).step_by(64).for_each(|page| map.write(page, 7));
        if round % 2 == 1 {
            // The collapse then brings the pages back from swap.
            map.advise(libc::MADV_PAGEOUT)?;
        }

        let addr = map.addr as usize;
        let delay = Duration::from_micros(150 * (round * 37 % ROUNDS));
        let result = std::thread::scope(|scope| {
            let collapse = scope.spawn(move || {
                let (addr, pages) = (addr as *mut u8, HUGE);
                let result = Map { addr, pages }.advise(libc::MADV_COLLAPSE);
                (result.is_ok(), Instant::now())
            });
            let start = Instant::now();
            while start.elapsed() < delay {}
            let began = Instant::now();
            map.unmap()?;
            let (ok, ended) = collapse.join().expect("a thread panicked");
            Ok::<_, anyhow::Error>((ok, ended > began))
        })?;
        collapsed += u64::from(result.0);
        at_once += u64::from(result.1);
        let pages = info(&dev)?;
        left += u64::from((pages.resident, pages.swapped) != (0, 0));
        let again = Map::shared(&dev, HUGE, 0)?;
        stale += u64::from((0..HUGE).any(|page| again.read(page) != 0));
        again.unmap()?;
        expect_resident(&dev, 0, "all unmapped again")?;
        place.unmap()?;
        round += 1;
    }
    println!("{round} rounds, {collapsed} collapsed, {at_once} ended after the unmap began");
    // A collapse may put a huge page of zeros into the file after `close`. The next close frees it.
    println!("pages were left in {left} rounds");
    ensure!(
        stale == 0,
        "old data after all was unmapped in {stale} rounds"
    );
    Ok(())
}
