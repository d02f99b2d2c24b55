// SPDX-License-Identifier: GPL-2.0

//! The cost of a page: touched, unmapped, mapped over, swapped in.

use std::ffi::CStr;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::mount::MountFlags;
use rustix::mount::mount_remount;

use crate::Bench;
use crate::Cost;
use crate::Scale;
use crate::Setting;
use crate::child::Child;
use crate::memory::ALL;
use crate::memory::FILES;
use crate::memory::HUGE;
use crate::memory::Map;
use crate::memory::Memory;
use crate::memory::PAGE;
use crate::memory::PARTS;
use crate::memory::Subject;
use crate::memory::Subject::*;
use crate::memory::TMPFS;
use crate::memory::expect;
use crate::memory::image;
use crate::memory::image_word;
use crate::memory::vmstat;
use crate::timed;

const MIB: usize = (1 << 20) / PAGE;
/// 64 MiB.
pub const MANY: usize = 64 * MIB;
const MAX_MAPS: &str = "/proc/sys/vm/max_map_count";
pub const SHMEM_HUGE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
pub const ANON_HUGE: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Number of pages by which the program's own heap may grow while private pages are counted.
const HEAP: usize = 64;

/// Fails unless there are `expected` more pages than `before`.
fn expect_new(subject: Subject, before: usize, expected: usize) -> Result<()> {
    let new = subject.resident()?.wrapping_sub(before) as isize;
    let slack = if subject == Private { HEAP } else { 0 };
    ensure!(
        new.abs_diff(expected as isize) <= slack,
        "{new} new pages, expected {expected}"
    );
    Ok(())
}

/// The sum of the content of `pages` pages after all were written.
fn sum_of(pages: usize) -> u64 {
    (1..=pages as u64).sum()
}

fn write_first(subject: Subject, pages: usize) -> Result<Cost> {
    let before = subject.resident()?;
    let memory = Memory::new(subject, pages)?;
    let map = memory.map(0, pages)?;
    let (time, ()) = timed(|| {
        map.write_all();
        Ok(())
    })?;
    expect_new(subject, before, pages)?;
    memory.give_back(map, 0)?;
    expect_new(subject, before, 0)?;
    Ok(Cost::time(time, pages))
}

fn read_first(subject: Subject, pages: usize) -> Result<Cost> {
    let before = subject.resident()?;
    let memory = Memory::new(subject, pages)?;
    let map = memory.map(0, pages)?;
    let (time, sum) = timed(|| Ok(map.read_all()))?;
    ensure!(sum == 0, "new memory is not zero");
    // Private memory that was only read maps the shared zero page.
    expect_new(subject, before, if subject == Private { 0 } else { pages })?;
    memory.give_back(map, 0)?;
    expect_new(subject, before, 0)?;
    Ok(Cost::time(time, pages))
}

/// Of two mappings of the same pages, the first is unmapped, and the second touched.
fn touch_again(subject: Subject, pages: usize, write: bool) -> Result<Cost> {
    let before = subject.resident()?;
    let memory = Memory::new(subject, pages)?;
    let first = memory.map(0, pages)?;
    first.write_all();
    let second = memory.map(0, pages)?;
    first.unmap()?;
    let (time, sum) = timed(|| {
        Ok(if write {
            second.write_all();
            0
        } else {
            second.read_all()
        })
    })?;
    ensure!(write || sum == sum_of(pages), "wrong data");
    expect_new(subject, before, pages)?;
    memory.give_back(second, 0)?;
    expect_new(subject, before, 0)?;
    Ok(Cost::time(time, pages))
}

/// One of two mappings is unmapped piece by piece, which must free nothing.
fn unmap_one_of_two(subject: Subject, pages: usize, piece: usize) -> Result<Cost> {
    let before = subject.resident()?;
    let memory = Memory::new(subject, pages)?;
    let first = memory.map(0, pages)?;
    let second = memory.map(0, pages)?;
    first.write_all();
    let (time, ()) = timed(|| {
        for (_, piece) in first.pieces(piece) {
            piece.unmap()?;
        }
        Ok(())
    })?;
    expect_new(subject, before, pages)?;
    memory.give_back(second, 0)?;
    expect_new(subject, before, 0)?;
    Ok(Cost::time(time, pages))
}

pub fn free(subject: Subject, pages: usize, piece: usize) -> Result<Cost> {
    let before = subject.resident()?;
    let memory = Memory::new(subject, pages)?;
    let map = memory.map(0, pages)?;
    map.write_all();
    expect_new(subject, before, pages)?;
    let (time, ()) = timed(|| {
        for (page, piece) in map.pieces(piece) {
            memory.give_back(piece, page)?;
        }
        Ok(())
    })?;
    expect_new(subject, before, 0)?;
    Ok(Cost::time(time, pages))
}

/// Punches a hole over each page of an unmapped file, with the page present or absent: the difference
/// is the kernel's cost of removing one page.
fn punch(subject: Subject, pages: usize, present: bool) -> Result<Cost> {
    let before = subject.resident()?;
    let memory = Memory::new(subject, pages)?;
    if present {
        let map = memory.map(0, pages)?;
        map.write_all();
        map.unmap()?;
        expect_new(subject, before, pages)?;
    }
    let (time, ()) = timed(|| {
        for page in 0..pages {
            memory.punch(page, 1)?;
        }
        Ok(())
    })?;
    expect_new(subject, before, 0)?;
    Ok(Cost::time(time, pages))
}

/// Every third page is given back.
fn free_holes(subject: Subject, holes: usize) -> Result<Cost> {
    let before = subject.resident()?;
    let memory = Memory::new(subject, 3 * holes)?;
    let map = memory.map(0, 3 * holes)?;
    map.write_all();
    let (time, ()) = timed(|| {
        for hole in 0..holes {
            let page = 3 * hole + 1;
            memory.give_back(map.part(page, 1), page)?;
        }
        Ok(())
    })?;
    expect_new(subject, before, 2 * holes)?;
    memory.discard(map)?;
    Ok(Cost::time(time, holes))
}

/// A process with `vmas` VMAs of `pages` pages each exits, and its pages are freed.
fn exit(subject: Subject, vmas: usize, pages: usize) -> Result<Cost> {
    let before = subject.resident()?;
    let memory = Memory::new(subject, vmas * pages)?;
    let mut child = Child::start(
        || {
            let room = Map::reserve(vmas * (pages + 1))?;
            for (vma, (_, there)) in room.pieces(pages + 1).enumerate() {
                memory
                    .map_over(there.part(0, pages), vma * pages)?
                    .write_all();
            }
            expect("VMAs", room.vmas()?, 2 * vmas)
        },
        |()| Ok(()),
    )?;
    expect_new(subject, before, vmas * pages)?;
    let (time, ()) = timed(|| {
        child.go()?;
        child.wait()?;
        if subject == Memfd {
            memory.punch(0, vmas * pages)?;
        }
        Ok(())
    })?;
    expect_new(subject, before, 0)?;
    Ok(Cost::time(time, vmas * pages))
}

/// Maps pages of a file over every other run of pages, as `ubd=mmap` does. The pages below are given
/// back, or stay in their file.
fn map_over(subject: Subject, runs: usize, run: usize, stays: bool) -> Result<Cost> {
    let image = image(runs * run)?;
    let before = subject.resident()?;
    let memory = Memory::new(subject, 2 * runs * run)?;
    let map = memory.map(0, 2 * runs * run)?;
    map.write_all();
    let (time, ()) = timed(|| {
        for number in 0..runs {
            let part = map.part(2 * number * run, run);
            if matches!(subject, Memfd | Tmpfs) && !stays {
                part.remove()?;
            }
            part.cover(&image, number * run)?;
        }
        Ok(())
    })?;
    expect_new(subject, before, if stays { 2 } else { 1 } * runs * run)?;
    for page in 0..2 * runs * run {
        let number = page / (2 * run);
        let expected = match page % (2 * run) {
            first if first < run => image_word(number * run + first),
            _ => page as u64 + 1,
        };
        ensure!(map.read(page) == expected, "wrong data in page {page}");
    }
    memory.discard(map)?;
    Ok(Cost::time(time, runs * run))
}

/// Enables huge pages everywhere, until dropped.
struct HugePages {
    _shmem: Setting,
    _private: Setting,
}

impl HugePages {
    fn new() -> Result<Self> {
        remount(c"huge=always")?;
        Ok(Self {
            _shmem: Setting::set(SHMEM_HUGE, "always")?,
            _private: Setting::set(ANON_HUGE, "always")?,
        })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = remount(c"huge=never");
    }
}

fn remount(options: &CStr) -> Result<()> {
    Ok(mount_remount(TMPFS, MountFlags::empty(), options)?)
}

fn huge_pages(subject: Subject) -> Result<usize> {
    Ok(HUGE
        * vmstat(match subject {
            Private => "nr_anon_transparent_hugepages",
            _ => "nr_shmem_hugepages",
        })?)
}

fn write_huge(subject: Subject, pages: usize) -> Result<Cost> {
    let _huge = HugePages::new()?;
    let before = huge_pages(subject)?;
    let memory = Memory::new(subject, pages)?;
    let map = memory.map(0, pages)?;
    let (time, ()) = timed(|| {
        map.write_all();
        Ok(())
    })?;
    expect("in huge pages", huge_pages(subject)? - before, pages)?;
    memory.give_back(map, 0)?;
    Ok(Cost::time(time, pages))
}

fn free_huge(subject: Subject, pages: usize, piece: usize) -> Result<Cost> {
    let _huge = HugePages::new()?;
    let resident = subject.resident()?;
    let before = huge_pages(subject)?;
    let memory = Memory::new(subject, pages)?;
    let map = memory.map(0, pages)?;
    map.write_all();
    expect("in huge pages", huge_pages(subject)? - before, pages)?;
    let (time, ()) = timed(|| {
        for (page, piece) in map.pieces(piece) {
            memory.give_back(piece, page)?;
        }
        Ok(())
    })?;
    // A private huge page is split only some time after its parts are unmapped.
    if subject != Private {
        expect_new(subject, resident, 0)?;
    }
    Ok(Cost::time(time, pages))
}

/// Reads swapped-out pages, one by one.
fn swap_in(subject: Subject, pages: usize) -> Result<Cost> {
    let memory = Memory::new(subject, pages)?;
    let map = memory.map(0, pages)?;
    map.write_all();
    map.page_out().context("MADV_PAGEOUT")?;
    let (in_core, before) = (map.in_core()?, vmstat("pswpin")?);
    ensure!(
        in_core < pages / 8,
        "{in_core} of {pages} pages are still in memory"
    );
    let (time, sum) = timed(|| Ok(map.read_all()))?;
    ensure!(sum == sum_of(pages), "wrong data");
    ensure!(
        vmstat("pswpin")? - before >= pages - in_core,
        "the pages were not read from swap"
    );
    memory.discard(map)?;
    Ok(Cost::time(time, pages))
}

pub fn benches(scale: Scale) -> Vec<Bench> {
    let some = scale.of(4 * MIB);
    let many = scale.of(MANY);
    let mut benches = vec![
        Bench::new("first touch, write", "a page written to", ALL, move |s| {
            write_first(s, some)
        }),
        Bench::new("first touch, read", "a page read", ALL, move |s| {
            read_first(s, some)
        }),
        Bench::new(
            "touch again, write",
            "a resident page written to, by a mapping that has it not yet",
            FILES,
            move |s| touch_again(s, some, true),
        ),
        Bench::new(
            "touch again, read (fault-around)",
            "a resident page read, by a mapping that has it not yet",
            FILES,
            move |s| touch_again(s, 4 * some, false),
        ),
        Bench::new(
            "unmap one of two mappings, by 4 KiB",
            "a page unmapped that stays",
            FILES,
            move |s| unmap_one_of_two(s, some, 1),
        ),
        Bench::new(
            "unmap one of two mappings, bulk",
            "a page unmapped that stays, of one large mapping",
            FILES,
            move |s| unmap_one_of_two(s, some, some),
        )
        .rounds(3),
        Bench::new(
            "unmap and free, bulk",
            "a page of one large mapping",
            ALL,
            move |s| free(s, many, many),
        )
        .rounds(3),
        Bench::new(
            "unmap and free, by 4 KiB",
            "a page, each given back by itself",
            PARTS,
            move |s| free(s, some, 1),
        ),
        Bench::new(
            "unmap and free, by 64 KiB",
            "a page, 16 given back at once",
            PARTS,
            move |s| free(s, some, 16),
        ),
        Bench::new(
            "unmap and free, by 2 MiB",
            "a page, 512 given back at once",
            PARTS,
            move |s| free(s, (4 * some).max(HUGE), HUGE),
        )
        .rounds(5),
        Bench::new(
            "unmap and free, holes of 4 KiB",
            "a page amid others that stay",
            PARTS,
            move |s| free_holes(s, some / 2),
        ),
        Bench::new(
            "punch a hole, a page in it",
            "a hole of a page, which nobody maps",
            &[Memfd],
            move |s| punch(s, some, true),
        ),
        Bench::new(
            "punch a hole, nothing in it",
            "a hole of a page where there is none",
            &[Memfd],
            move |s| punch(s, some, false),
        ),
        Bench::new(
            "map a file over a page",
            "a page replaced by one of a file",
            FILES,
            move |s| map_over(s, some / 2, 1, false),
        ),
        Bench::new(
            "map a file over 64 KiB",
            "a page replaced by one of a file, 16 at once",
            FILES,
            move |s| map_over(s, some / 32, 16, false),
        ),
        Bench::new(
            "map a file over a page that stays",
            "a page mapped over, and not freed",
            &[Memfd, Tmpfs],
            move |s| map_over(s, some / 2, 1, true),
        ),
    ];
    const MAPPED: &[Subject] = &[Device, Ioctl, Memfd];
    for vmas in scale.up_to(&[1, 1000, 50_000]) {
        let pages = (10_000 / vmas).max(1);
        benches.push(
            Bench::new(
                "exit of a process, by VMAs",
                "a page of a process that ends, and is freed",
                MAPPED,
                move |s| {
                    let _maps = Setting::set(MAX_MAPS, "1000000")?;
                    exit(s, vmas, pages)
                },
            )
            .at(vmas)
            .rounds(if vmas > 1000 { 1 } else { 3 }),
        );
    }
    let large = many.max(HUGE);
    benches.extend([
        Bench::new(
            "huge pages: first touch, write",
            "a page written to",
            PARTS,
            move |s| write_huge(s, large),
        )
        .rounds(2),
        Bench::new(
            "huge pages: unmap and free, by 2 MiB",
            "a page, 512 given back at once",
            PARTS,
            move |s| free_huge(s, large, HUGE),
        )
        .rounds(2),
        Bench::new(
            "huge pages: unmap and free, by 4 KiB",
            "a page, each given back by itself",
            PARTS,
            move |s| free_huge(s, 4 * HUGE, 1),
        ),
        Bench::new("swap-in", "a page read that was in swap", PARTS, move |s| {
            swap_in(s, some)
        })
        .rounds(3),
    ]);
    benches
}
