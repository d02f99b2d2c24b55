// SPDX-License-Identifier: GPL-2.0

//! The rule: a page is freed when the last mapping that covers it goes away, and no sooner.

use crate::sys::*;
use anyhow::{Context, Result, ensure};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::{fs, ptr};

/// The tag tests fill pages with. Not zero, so that a page that came back empty is noticed.
const TAG: u64 = 0xa110_c8ed_0000_0000;

pub fn munmap_whole() -> Result<()> {
    let dev = device()?;
    let before = meminfo("Shmem")?;
    let map = Map::shared(&dev, 2048, 0)?;
    map.fill(TAG);
    expect_resident(&dev, 2048, "touched")?;
    ensure!(
        meminfo("Shmem")? >= before + 2048,
        "Shmem did not grow by the touched pages"
    );

    map.unmap()?;
    expect_resident(&dev, 0, "unmapped")?;
    ensure!(info(&dev)?.freed == 2048, "freed: {}", info(&dev)?.freed);
    ensure!(meminfo("Shmem")? < before + 64, "Shmem did not drop back");
    Map::shared(&dev, 2048, 0)?.check_zero()
}

pub fn munmap_head_and_tail() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 64, 0)?;
    map.fill(TAG);
    map.part(0, 10).unmap()?;
    expect_resident(&dev, 54, "head unmapped")?;
    map.part(60, 4).unmap()?;
    expect_resident(&dev, 50, "tail unmapped")?;
    map.part(10, 50).check(TAG + 10)?;
    map.part(10, 50).unmap()?;
    expect_resident(&dev, 0, "all unmapped")
}

pub fn munmap_hole_in_the_middle() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 64, 0)?;
    map.fill(TAG);
    map.part(20, 5).unmap()?;
    expect_resident(&dev, 59, "hole")?;
    map.part(0, 20).check(TAG)?;
    map.part(25, 39).check(TAG + 25)?;
    map.part(20, 5).cover(&dev, 20)?.check_zero()
}

pub fn munmap_one_by_one() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 64, 1000)?;
    map.fill(TAG);
    // Odd pages first: unmapping each of them splits a VMA.
    for (done, page) in (1..64).step_by(2).chain((0..64).step_by(2)).enumerate() {
        map.part(page, 1).unmap()?;
        expect_resident(&dev, 63 - done, "one more")?;
    }
    Ok(())
}

pub fn map_fixed_over_by_a_file() -> Result<()> {
    let dev = device()?;
    let other = memfd(64)?;
    let map = Map::shared(&dev, 64, 0)?;
    map.fill(TAG);
    map.part(16, 32).cover(&other, 0)?.fill(7);
    expect_resident(&dev, 32, "half mapped over")?;
    map.part(0, 16).check(TAG)?;
    map.part(48, 16).check(TAG + 48)?;
    map.part(16, 32).cover(&dev, 16)?.check_zero()
}

pub fn map_fixed_over_by_anonymous_memory() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 64, 0)?;
    map.fill(TAG);
    map.part(32, 32).cover_anonymous()?.check_zero()?;
    expect_resident(&dev, 32, "half mapped over")?;
    map.part(0, 32).check(TAG)
}

pub fn map_fixed_over_by_the_same_pages() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 0)?;
    map.fill(TAG);
    // The old mapping goes away before the new one exists: in between nothing covers the pages.
    map.cover(&dev, 0)?;
    expect_resident(&dev, 0, "mapped over")?;
    map.check_zero()?;

    // Another mapping of the same pages keeps them.
    let keeper = Map::shared(&dev, 16, 0)?;
    map.fill(TAG);
    map.cover(&dev, 0)?;
    expect_resident(&dev, 16, "mapped over, kept by another")?;
    map.check(TAG)?;
    keeper.check(TAG)
}

pub fn mremap_moves() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 64, 5)?;
    map.fill(TAG);
    let place = Map::reserve(64)?;
    let moved = map.remap(64, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, place.addr)?;
    ensure!(moved.addr == place.addr, "not moved");
    expect_resident(&dev, 64, "moved")?;
    moved.check(TAG)?;

    // Moving a part of the mapping splits the VMA.
    let middle = moved.part(20, 10);
    let place = Map::reserve(10)?;
    let middle = middle.remap(10, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, place.addr)?;
    expect_resident(&dev, 64, "middle moved")?;
    middle.check(TAG + 20)?;
    moved.part(0, 20).unmap()?;
    moved.part(30, 34).unmap()?;
    expect_resident(&dev, 10, "rest unmapped")?;
    middle.unmap()?;
    expect_resident(&dev, 0, "middle unmapped")
}

pub fn mremap_grows_and_shrinks() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 32, 0)?;
    map.fill(TAG);
    let map = map.remap(64, libc::MREMAP_MAYMOVE, ptr::null_mut())?;
    expect_resident(&dev, 32, "grown")?;
    map.part(0, 32).check(TAG)?;
    map.part(32, 32).check_zero()?;
    map.fill(TAG);
    expect_resident(&dev, 64, "touched")?;
    let map = map.remap(8, 0, ptr::null_mut())?;
    expect_resident(&dev, 8, "shrunk")?;
    map.check(TAG)
}

pub fn mremap_over_a_mapping() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 32, 0)?;
    let victim = Map::shared(&dev, 32, 100)?;
    map.fill(TAG);
    victim.fill(TAG);
    let map = map.remap(32, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, victim.addr)?;
    expect_resident(&dev, 32, "victim mapped over")?;
    map.check(TAG)
}

pub fn mremap_makes_a_second_mapping() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 0)?;
    map.fill(TAG);
    // An old size of 0 copies a shared mapping.
    let empty = Map {
        addr: map.addr,
        pages: 0,
    };
    let second = empty.remap(16, libc::MREMAP_MAYMOVE, ptr::null_mut())?;
    second.check(TAG)?;
    map.unmap()?;
    expect_resident(&dev, 16, "first unmapped")?;
    second.check(TAG)?;
    second.unmap()?;
    expect_resident(&dev, 0, "second unmapped")
}

/// One call moves several adjacent VMAs, as with tmpfs.
pub fn mremap_moves_several_at_once() -> Result<()> {
    for fd in [device()?, memfd(64)?] {
        let place = Map::reserve(16)?;
        place.part(0, 8).cover(&fd, 0)?.fill(TAG);
        place.part(8, 8).cover(&fd, 32)?.fill(TAG + 8);
        let to = Map::reserve(16)?;
        let moved = place.remap(16, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to.addr)?;
        moved.check(TAG)?;
    }
    Ok(())
}

/// Thousands of mappings go away and thousands of overlapping ones stay, but no page was ever
/// touched. There is nothing to free, so the time must not grow with the product of both numbers.
pub fn many_untouched_mappings_close_quickly() -> Result<()> {
    const MANY: usize = 3000;
    let time = |fd: &OwnedFd| -> Result<std::time::Duration> {
        let place = Map::reserve(2 * MANY)?;
        for page in 0..MANY {
            place.part(2 * page, 1).cover(fd, 2 * page)?;
        }
        let mut child = fork(|peer| {
            for _ in 0..MANY {
                Map::shared(fd, 2 * MANY, 0)?;
            }
            peer.meet()?;
            peer.meet()
        })?;
        child.meet()?;
        let start = std::time::Instant::now();
        child.kill()?;
        place.unmap()?;
        Ok(start.elapsed())
    };
    let (ours, peer) = (time(&device()?)?, time(&memfd(2 * MANY)?)?);
    println!("{ours:?}, {peer:?} with a memfd");
    // Quadratic closing takes seconds; a correct driver takes some hundredths of one.
    ensure!(
        ours < 10 * peer + std::time::Duration::from_secs(1),
        "{ours:?}, {peer:?} with a memfd"
    );
    Ok(())
}

pub fn fork_child_unmaps() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 0)?;
    map.fill(TAG);
    fork(|_| {
        map.check(TAG)?;
        map.unmap()
    })?
    .join()?;
    expect_resident(&dev, 16, "child unmapped and gone")?;
    map.check(TAG)
}

pub fn fork_parent_unmaps() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 0)?;
    map.fill(TAG);
    let mut child = fork(|peer| {
        peer.meet()?;
        // This process has covered the pages all along, but touches them only now.
        peer.meet()?;
        map.check(TAG)
    })?;
    child.meet()?;
    map.unmap()?;
    expect_resident(&dev, 16, "parent unmapped")?;
    child.meet()?;
    child.join()?;
    expect_resident(&dev, 0, "child gone")
}

/// At exit, all mappings have left the tree before the first of them is closed, and that close may
/// free pages of the others. Whatever their order in the file, pages that another process maps
/// stay, and so does data that was written and never mapped.
pub fn exit_with_many_mappings() -> Result<()> {
    const PAGES: usize = 300;
    // Through each door: forwards, backwards, and in strides.
    for (door, order) in [
        (0, 1),
        (0, PAGES - 1),
        (0, 7),
        (1, 1),
        (1, PAGES - 1),
        (1, 7),
    ] {
        let fd = if door == 0 {
            device()?
        } else {
            ioctl_file(PAGES + 1)?
        };
        if door == 1 {
            fs::File::from(fd.try_clone()?).write_all_at(b"kept", (PAGES * PAGE) as u64)?;
        }
        let mut child = fork(|peer| {
            let place = Map::reserve(2 * PAGES)?;
            for number in 0..PAGES {
                let page = number * order % PAGES;
                let map = place.part(2 * number, 1).cover(&fd, page)?;
                map.write(0, TAG + page as u64);
            }
            peer.meet()?;
            peer.meet()
        })?;
        child.meet()?;
        let ours = [Map::shared(&fd, 1, 0)?, Map::shared(&fd, 2, PAGES / 2)?];
        let written = door;
        expect_resident(&fd, PAGES + written, "mapped")?;
        child.meet()?;
        child.join()?;
        expect_resident(&fd, 3 + written, "the process is gone")?;
        ours[0].check(TAG)?;
        ours[1].check(TAG + (PAGES / 2) as u64)?;
        for map in ours {
            map.unmap()?;
        }
        expect_resident(&fd, written, "all unmapped")?;
    }
    Ok(())
}

pub fn covered_but_not_touched() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 0)?;
    let other = Map::shared(&dev, 4, 6)?;
    map.fill(TAG);
    map.unmap()?;
    expect_resident(&dev, 4, "the rest unmapped")?;
    other.check(TAG + 6)?;
    other.unmap()?;
    expect_resident(&dev, 0, "all unmapped")
}

pub fn several_mappings_in_one_process() -> Result<()> {
    let dev = device()?;
    let a = Map::shared(&dev, 32, 0)?;
    let b = Map::shared(&dev, 32, 16)?;
    let c = Map::shared(&dev, 8, 20)?;
    a.fill(TAG);
    b.part(16, 16).fill(TAG + 32);
    expect_resident(&dev, 48, "touched")?;
    a.unmap()?;
    expect_resident(&dev, 32, "first unmapped")?;
    b.check(TAG + 16)?;
    b.unmap()?;
    expect_resident(&dev, 8, "second unmapped")?;
    c.check(TAG + 20)?;
    c.unmap()?;
    expect_resident(&dev, 0, "third unmapped")
}

/// Pages are mapped at a second address, without access. That mapping keeps them all the same.
pub fn inaccessible_mapping_keeps_pages() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 0)?;
    let second = Map::shared(&dev, 16, 0)?;
    second.protect(libc::PROT_NONE)?;
    map.fill(TAG);
    map.unmap()?;
    expect_resident(&dev, 16, "the accessible mapping unmapped")?;
    second.protect(RW)?;
    second.check(TAG)?;
    second.unmap()?;
    expect_resident(&dev, 0, "both unmapped")
}

pub fn exit_frees() -> Result<()> {
    let dev = device()?;
    let mut child = fork(|peer| {
        Map::shared(&dev, 64, 0)?.fill(TAG);
        peer.meet()?;
        peer.meet()
    })?;
    child.meet()?;
    expect_resident(&dev, 64, "mapped by the child")?;
    child.meet()?;
    child.join()?;
    expect_resident(&dev, 0, "child gone")?;
    Map::shared(&dev, 64, 0)?.check_zero()
}

pub fn sigkill_frees() -> Result<()> {
    let dev = device()?;
    let mut child = fork(|peer| {
        Map::shared(&dev, 64, 0)?.fill(TAG);
        peer.meet()?;
        peer.meet()
    })?;
    child.meet()?;
    expect_resident(&dev, 64, "mapped by the child")?;
    child.kill()?;
    expect_resident(&dev, 0, "child killed")
}

pub fn exec_frees() -> Result<()> {
    let dev = device()?;
    let child = fork(|_| {
        Map::shared(&dev, 64, 0)?.fill(TAG);
        let err = std::os::unix::process::CommandExt::exec(
            Command::new("/bin/busybox").args(["sleep", "60"]),
        );
        Err(err.into())
    })?;
    for _ in 0..500 {
        let maps = fs::read_to_string(format!("/proc/{}/maps", child.pid))?;
        if maps.contains("busybox") && info(&dev)?.freed != 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let result = expect_resident(&dev, 0, "execed");
    child.kill()?;
    result
}

pub fn closing_the_device_frees_nothing_mapped() -> Result<()> {
    let dev = device()?;
    let before = meminfo("Shmem")?;
    let map = Map::shared(&dev, 2048, 0)?;
    map.fill(TAG);
    drop(dev);
    map.check(TAG)?;
    map.unmap()?;
    ensure!(meminfo("Shmem")? < before + 64, "Shmem did not drop back");
    Ok(())
}

pub fn private_mappings() -> Result<()> {
    let dev = device()?;
    let shared = Map::shared(&dev, 16, 0)?;
    shared.fill(TAG);
    let private = Map::private(&dev, 16, 0)?;
    private.check(TAG)?;
    private.part(0, 8).fill(1);
    shared.check(TAG)?;
    private.part(0, 8).check(1)?;
    shared.unmap()?;
    expect_resident(&dev, 16, "covered by the private mapping")?;
    private.part(8, 8).check(TAG + 8)?;
    private.unmap()?;
    expect_resident(&dev, 0, "all unmapped")
}

pub fn executable_pages() -> Result<()> {
    let dev = device()?;
    let prot = RW | libc::PROT_EXEC;
    let map = Map::new(
        ptr::null_mut(),
        1,
        prot,
        libc::MAP_SHARED,
        dev.as_raw_fd(),
        3,
    )?;
    // mov $42, %eax; ret
    let code = [0xb8, 42, 0, 0, 0, 0xc3];
    // SAFETY: Six bytes fit into a page; what is called is what was written.
    let answer = unsafe {
        ptr::copy_nonoverlapping(code.as_ptr(), map.addr, code.len());
        std::mem::transmute::<*mut u8, extern "C" fn() -> i32>(map.addr)()
    };
    ensure!(answer == 42, "{answer}");
    Ok(())
}

pub fn mlocked_pages() -> Result<()> {
    let dev = device()?;
    let before = meminfo("Mlocked")?;
    let map = Map::shared(&dev, 64, 0)?;
    map.lock()?;
    expect_resident(&dev, 64, "locked, so brought in")?;
    map.fill(TAG);
    map.part(0, 32).unmap()?;
    expect_resident(&dev, 32, "half unmapped")?;
    map.part(32, 32).check(TAG + 32)?;
    map.part(32, 32).unmap()?;
    expect_resident(&dev, 0, "all unmapped")?;
    ensure!(meminfo("Mlocked")? <= before + 8, "Mlocked did not go back");
    Ok(())
}

/// Pages go to swap and come back; pages unmapped while in swap give back their slots.
pub fn swapped_out_pages() -> Result<()> {
    let dev = device()?;
    let free = meminfo("SwapFree")?;
    ensure!(
        free > 4096,
        "too little swap: the test run has to set it up"
    );
    let map = Map::shared(&dev, 2048, 0)?;
    map.fill(TAG);
    page_out(&dev, map)?;
    let out = info(&dev)?;
    ensure!(out.resident + out.swapped == 2048, "{out:?}");
    ensure!(meminfo("SwapFree")? < free - 1024, "SwapFree did not fall");

    map.part(0, 256).check(TAG)?;
    map.part(256, 768).unmap()?;
    let half = info(&dev)?;
    ensure!(half.resident + half.swapped == 1280, "{half:?}");
    map.part(1024, 1024).check(TAG + 1024)?;
    page_out(&dev, map.part(1024, 1024))?;
    map.part(0, 256).unmap()?;
    map.part(1024, 1024).unmap()?;
    let none = info(&dev)?;
    ensure!((none.resident, none.swapped) == (0, 0), "{none:?}");
    ensure!(none.freed == 2048, "{none:?}");
    ensure!(
        meminfo("SwapFree")? + 64 >= free,
        "swap slots did not come back"
    );
    Map::shared(&dev, 2048, 0)?.check_zero()
}

/// Swaps out at least three quarters of `map`.
pub fn page_out(dev: &OwnedFd, map: Map) -> Result<()> {
    for _ in 0..20 {
        map.advise(libc::MADV_PAGEOUT).context("MADV_PAGEOUT")?;
        if info(dev)?.swapped >= map.pages * 3 / 4 {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    anyhow::bail!("MADV_PAGEOUT: {:?} of {} pages", info(dev)?, map.pages)
}

pub fn madvise_keeps_what_is_mapped() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 0)?;
    map.fill(TAG);
    for advice in [
        libc::MADV_DONTNEED,
        libc::MADV_COLD,
        libc::MADV_PAGEOUT,
        libc::MADV_WILLNEED,
        libc::MADV_RANDOM,
        libc::MADV_POPULATE_WRITE,
    ] {
        map.advise(advice)
            .with_context(|| format!("advice {advice}"))?;
        let info = info(&dev)?;
        ensure!(
            info.resident + info.swapped == 16,
            "advice {advice}: {info:?}"
        );
        map.check(TAG).with_context(|| format!("advice {advice}"))?;
    }
    map.protect(libc::PROT_NONE)?;
    map.protect(RW)?;
    map.check(TAG)?;
    expect_errno("MADV_FREE", map.advise(libc::MADV_FREE), libc::EINVAL)
}

pub fn madvise_remove_frees() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 4)?;
    let other = Map::shared(&dev, 16, 4)?;
    map.fill(TAG);
    map.part(4, 4).advise(libc::MADV_REMOVE)?;
    expect_resident(&dev, 12, "removed")?;
    other.part(4, 4).check_zero()?;
    other.part(0, 4).check(TAG)?;
    other.part(8, 8).check(TAG + 8)
}

pub fn madvise_dontfork() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 0)?;
    map.fill(TAG);
    map.advise(libc::MADV_DONTFORK)?;
    let mut child = fork(|peer| {
        peer.meet()?;
        peer.meet()
    })?;
    child.meet()?;
    map.unmap()?;
    expect_resident(&dev, 0, "unmapped, and never the child's")?;
    child.meet()?;
    child.join()
}

const HUGE: usize = 512;
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// A filled range of huge pages, aligned in file and address space. Fails if the kernel made none.
fn huge_pages(dev: &OwnedFd, pages: usize) -> Result<Map> {
    fs::write(SHMEM_ENABLED, "advise")?;
    let place = Map::reserve(pages + HUGE)?;
    let skip = place.addr.align_offset(HUGE * PAGE) / PAGE;
    let map = place.part(skip, pages).cover(dev, 0)?;
    map.advise(libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
    map.fill(TAG);
    ensure!(
        meminfo("ShmemHugePages")? >= pages,
        "no huge pages were made"
    );
    Ok(map)
}

pub fn huge_pages_partly_unmapped() -> Result<()> {
    let dev = device()?;
    let map = huge_pages(&dev, 4 * HUGE)?;
    expect_resident(&dev, 4 * HUGE, "touched")?;
    // A part of one huge page, parts of two neighbours, and a whole one.
    map.part(100, 28).unmap()?;
    expect_resident(&dev, 4 * HUGE - 28, "28 in the middle of the first")?;
    map.part(HUGE - 10, 20).unmap()?;
    expect_resident(&dev, 4 * HUGE - 48, "20 across the first boundary")?;
    map.part(2 * HUGE, HUGE).unmap()?;
    expect_resident(&dev, 3 * HUGE - 48, "the third")?;
    map.part(0, 100).check(TAG)?;
    map.part(128, HUGE - 10 - 128).check(TAG + 128)?;
    map.part(HUGE + 10, HUGE - 10)
        .check(TAG + 10 + HUGE as u64)?;
    map.part(3 * HUGE, HUGE).check(TAG + 3 * HUGE as u64)?;
    map.part(100, 28).cover(&dev, 100)?.check_zero()?;
    map.unmap()?;
    expect_resident(&dev, 0, "all unmapped")
}

/// Without an address hint, large mappings are aligned for huge pages, as with tmpfs.
pub fn large_mappings_are_aligned() -> Result<()> {
    fs::write(SHMEM_ENABLED, "always")?;
    for fd in [device()?, ioctl_file(4 * HUGE)?] {
        // A small mapping first, so that the large one is not aligned by luck.
        Map::shared(&fd, 1, 0)?;
        let map = Map::shared(&fd, 2 * HUGE, 0)?;
        ensure!(
            map.addr.align_offset(HUGE * PAGE) == 0,
            "{:p} is not aligned",
            map.addr
        );
        map.fill(TAG);
        ensure!(meminfo("ShmemHugePages")? >= HUGE, "no huge page was made");
    }
    Ok(())
}

/// Touching one page must not create a huge page, since nobody would ever unmap the rest of it.
pub fn huge_pages_only_where_covered() -> Result<()> {
    fs::write(SHMEM_ENABLED, "always")?;
    let dev = device()?;
    let one = Map::shared(&dev, 1, 700)?;
    one.write(0, TAG);
    one.unmap()?;
    let left = info(&dev)?;
    fs::write(SHMEM_ENABLED, "never")?;
    ensure!(left.resident == 0, "{left:?}");
    Ok(())
}

/// Data written with write(2) and never mapped stays, even if it shares a folio with freed pages.
pub fn huge_page_written_and_partly_mapped() -> Result<()> {
    fs::write(SHMEM_ENABLED, "always")?;
    let file = ioctl_file(HUGE)?;
    let content: Vec<u8> = (0..HUGE * PAGE).map(|at| (at / PAGE) as u8 | 1).collect();
    file_of(&file)?.write_all_at(&content, 0)?;
    ensure!(meminfo("ShmemHugePages")? >= HUGE, "no huge page was made");
    Map::shared(&file, HUGE / 2, 0)?.unmap()?;
    expect_resident(&file, HUGE / 2, "half mapped and unmapped")?;
    let mut found = vec![0; HUGE * PAGE / 2];
    file_of(&file)?.read_exact_at(&mut found, (HUGE * PAGE / 2) as u64)?;
    ensure!(found == content[HUGE * PAGE / 2..], "written data lost");
    Ok(())
}

fn file_of(fd: &OwnedFd) -> Result<fs::File> {
    Ok(fs::File::from(fd.try_clone()?))
}

pub fn charged_to_whoever_touches() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 4096, 0)?;
    let group = Cgroup::new("test")?;
    group.join()?;
    let before = group.shmem()?;
    ensure!(
        before < 256,
        "{before} pages already charged to a new cgroup"
    );
    map.part(0, 2048).fill(TAG);
    let touched = group.shmem()?;
    ensure!(
        (2048 - 256..2048 + 256).contains(&touched),
        "{touched} pages charged for 2048"
    );
    map.part(1024, 3072).unmap()?;
    let half = group.shmem()?;
    ensure!(
        (1024 - 256..1024 + 256).contains(&half),
        "{half} pages charged for 1024"
    );
    map.part(0, 1024).unmap()?;
    let none = group.shmem()?;
    ensure!(none < 256, "{none} pages charged for none");
    Ok(())
}

/// Pins `map` with `FOLL_LONGTERM`, by registering it as an io_uring buffer.
fn pin(map: Map) -> Result<OwnedFd> {
    let mut params = [0u32; 30];
    let iovec = libc::iovec {
        iov_base: map.addr.cast(),
        iov_len: map.pages * PAGE,
    };
    // SAFETY: `struct io_uring_params` is 120 bytes, all zero by default; the descriptor is new.
    let ring = unsafe {
        let fd = cvt(libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) as i32)
            .context("io_uring_setup")?;
        OwnedFd::from_raw_fd(fd)
    };
    register(&ring, IORING_REGISTER_BUFFERS, Some(iovec)).context("IORING_REGISTER_BUFFERS")?;
    Ok(ring)
}

const IORING_REGISTER_BUFFERS: u32 = 0;
const IORING_UNREGISTER_BUFFERS: u32 = 1;

fn register(ring: &OwnedFd, what: u32, buffer: Option<libc::iovec>) -> std::io::Result<()> {
    let pointer = buffer.as_ref().map_or(ptr::null(), ptr::from_ref);
    let count = i32::from(buffer.is_some());
    // SAFETY: At most one iovec, of this process's memory.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            what,
            pointer,
            count,
        )
    };
    cvt(ret as i32).map(drop)
}

fn unpin(ring: OwnedFd) -> Result<()> {
    register(&ring, IORING_UNREGISTER_BUFFERS, None).context("IORING_UNREGISTER_BUFFERS")
}

/// A pin keeps the memory, but not the file's page: the file has lost the page once it is unmapped,
/// and the memory is freed with the pin.
pub fn pinned_pages() -> Result<()> {
    let dev = device()?;
    let group = Cgroup::new("test")?;
    group.join()?;
    let map = Map::shared(&dev, 4096, 0)?;
    map.fill(TAG);
    let ring = pin(map)?;
    map.unmap()?;
    expect_resident(&dev, 0, "unmapped, pinned")?;
    Map::shared(&dev, 4096, 0)?.part(0, 8).check_zero()?;
    let pinned = group.charged("memory.current")?;
    ensure!(
        pinned >= 4096,
        "{pinned} pages charged: the pin did not keep 4096"
    );

    unpin(ring)?;
    let left = group.charged("memory.current")?;
    ensure!(left < 2048, "{left} pages charged after the pin went");
    Ok(())
}

/// A pinned huge page cannot be split. Its parts are zeroed as they are unmapped, and the file
/// loses the page with the last of them.
pub fn pinned_huge_page_partly_unmapped() -> Result<()> {
    let dev = device()?;
    let map = huge_pages(&dev, HUGE)?;
    let ring = pin(map)?;
    map.part(0, HUGE / 2).unmap()?;
    map.part(HUGE / 2, HUGE / 2).check(TAG + HUGE as u64 / 2)?;
    map.part(0, HUGE / 2).cover(&dev, 0)?.check_zero()?;
    map.part(0, HUGE / 2).unmap()?;
    map.part(HUGE / 2, HUGE / 2).unmap()?;
    expect_resident(&dev, 0, "all unmapped, pinned")?;
    unpin(ring)?;
    expect_resident(&dev, 0, "pin gone")?;
    Map::shared(&dev, HUGE, 0)?.check_zero()
}

/// As above, but the page is unpinned before its second half is unmapped.
pub fn huge_page_pinned_for_a_while() -> Result<()> {
    let dev = device()?;
    let map = huge_pages(&dev, HUGE)?;
    let ring = pin(map)?;
    map.part(0, HUGE / 2).unmap()?;
    unpin(ring)?;
    map.part(HUGE / 2, HUGE / 2).check(TAG + HUGE as u64 / 2)?;
    map.part(HUGE / 2, HUGE / 2).unmap()?;
    expect_resident(&dev, 0, "all unmapped")
}

/// A collapse makes one huge page of small pages and holes. The filled holes have to be freed with
/// the rest.
pub fn collapsed_pages() -> Result<()> {
    let dev = device()?;
    fs::write(SHMEM_ENABLED, "advise")?;
    let place = Map::reserve(2 * HUGE)?;
    let skip = place.addr.align_offset(HUGE * PAGE) / PAGE;
    let map = place.part(skip, HUGE).cover(&dev, 0)?;
    map.part(0, HUGE / 2).fill(TAG);
    expect_resident(&dev, HUGE / 2, "half touched")?;
    map.advise(libc::MADV_COLLAPSE).context("MADV_COLLAPSE")?;
    expect_resident(&dev, HUGE, "collapsed")?;
    map.part(0, HUGE / 2).check(TAG)?;
    map.part(0, 1).unmap()?;
    map.part(1, HUGE - 1).unmap()?;
    expect_resident(&dev, 0, "all unmapped")
}

pub fn larger_than_dev_shm() -> Result<()> {
    let dev = device()?;
    // SAFETY: The kernel writes the result.
    let size = unsafe {
        let mut stat = std::mem::zeroed::<libc::statvfs>();
        cvt(libc::statvfs(c"/dev/shm".as_ptr(), &mut stat)).context("/dev/shm")?;
        stat.f_blocks as usize * stat.f_frsize as usize / PAGE
    };
    ensure!(
        size < 8192,
        "/dev/shm has {size} pages: the test run has to make it smaller"
    );
    let map = Map::shared(&dev, 4 * size, 0)?;
    map.fill(TAG);
    expect_resident(&dev, 4 * size, "touched")?;
    map.check(TAG)
}

/// Two opens, the same page numbers: neither sees the other's data, live or freed.
pub fn one_open_never_sees_another() -> Result<()> {
    let (a, b) = (device()?, device()?);
    let secret = Map::shared(&a, 1024, 0)?;
    secret.fill(TAG);
    let map = Map::shared(&b, 1024, 0)?;
    map.check_zero()?;
    map.fill(1);
    secret.check(TAG)?;
    // Pages freed by one object are likely to be allocated to the other.
    secret.unmap()?;
    Map::shared(&b, 1024, 4096)?.check_zero()?;
    map.check(1)
}

pub fn shared_by_dup_fork_and_scm_rights() -> Result<()> {
    use std::io::Write as _;

    let dev = device()?;
    let dup = dev.try_clone()?;
    let map = Map::shared(&dev, 4, 0)?;
    map.fill(TAG);
    Map::shared(&dup, 4, 0)?.check(TAG)?;
    fork(|_| Map::shared(&dev, 4, 0)?.check(TAG))?.join()?;

    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let child = fork(|_| {
        let dev = receive_fd(theirs.as_raw_fd())?;
        Map::shared(&dev, 4, 0)?.check(TAG)
    })?;
    send_fd(ours.as_raw_fd(), dev.as_raw_fd())?;
    ours.flush()?;
    child.join()
}

/// Room for one descriptor's control message, aligned as `struct cmsghdr`.
type Control = [u64; 4];

fn message(control: &mut Control, iovec: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: All zero is an empty message.
    let mut message = unsafe { std::mem::zeroed::<libc::msghdr>() };
    message.msg_iov = iovec;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: Pure arithmetic.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as usize;
    message
}

fn send_fd(socket: i32, fd: i32) -> Result<()> {
    let (mut control, mut byte): (Control, _) = ([0; 4], 0u8);
    let mut iovec = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let message = message(&mut control, &mut iovec);
    // SAFETY: The message has room for one header with one descriptor.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd);
        cvt(libc::sendmsg(socket, &message, 0) as i32).context("sendmsg")?;
    }
    Ok(())
}

fn receive_fd(socket: i32) -> Result<OwnedFd> {
    let (mut control, mut byte): (Control, _) = ([0; 4], 0u8);
    let mut iovec = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let mut message = message(&mut control, &mut iovec);
    // SAFETY: The message has room for one header with one descriptor, which is then ours.
    unsafe {
        cvt(libc::recvmsg(socket, &mut message, 0) as i32).context("recvmsg")?;
        let header = libc::CMSG_FIRSTHDR(&message);
        ensure!(!header.is_null(), "no descriptor received");
        Ok(OwnedFd::from_raw_fd(
            libc::CMSG_DATA(header).cast::<i32>().read_unaligned(),
        ))
    }
}
