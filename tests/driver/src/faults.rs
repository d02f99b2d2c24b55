// SPDX-License-Identifier: GPL-2.0

//! Allocation failures: each allocation fails in turn, on every path into the driver. Also, the
//! module is loaded and unloaded while it has users.
//!
//! `/proc/thread-self/fail-nth` makes the thread's N-th allocation, or copy from or to user space,
//! fail. [`fail_each`] raises N until nothing is left to fail.

use crate::doors::{MODULE, mknod};
use crate::rules::page_out;
use crate::sys::*;
use anyhow::{Context, Result, ensure};
use std::cell::Cell;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{process, ptr, thread};

const TAG: u64 = 0xfa11_0000_0000;
const PAGES: usize = 16;
const HUGE: usize = 512;

/// Where tests map. Nothing else is near, so page tables of all levels are still missing.
const PLACE: usize = 0x3000_0000_0000;
/// Pages of address space at [`PLACE`].
const ROOM: usize = 1 << 31;

/// A page far away from all others in its file, so that the file's XArray has to grow.
const FAR: usize = 1 << 40;

const NTH: &str = "/proc/thread-self/fail-nth";

/// Makes every kind of allocation a target, and faults silent. Skips the test if the kernel has no
/// fault injection.
fn enable_injection() -> Result<Vec<Setting>> {
    if !fs::exists(NTH)? {
        return skip("the kernel has no fault injection");
    }
    [
        ("failslab/verbose", "0"),
        ("failslab/ignore-gfp-wait", "N"),
        ("failslab/cache-filter", "N"),
        ("fail_page_alloc/verbose", "0"),
        ("fail_page_alloc/ignore-gfp-wait", "N"),
        ("fail_page_alloc/ignore-gfp-highmem", "N"),
        ("fail_page_alloc/min-order", "0"),
        ("fail_usercopy/verbose", "0"),
    ]
    .into_iter()
    .map(|(name, value)| Setting::set(format!("/sys/kernel/debug/{name}"), value))
    .collect()
}

fn huge_pages() -> Result<Setting> {
    Setting::set(
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "always",
    )
}

/// One fault to inject.
struct Fault {
    nth: u32,
    injected: Cell<bool>,
}

impl Fault {
    /// Runs `op` with its `nth` allocation failing, if it makes that many. Returns its result.
    fn during<T>(&self, op: impl FnOnce() -> T) -> Result<T> {
        let file = OpenOptions::new().read(true).write(true).open(NTH)?;
        let (nth, mut left) = (self.nth.to_string(), [0; 16]);
        file.write_all_at(nth.as_bytes(), 0)?;
        let result = op();
        // Both calls copy from or to user space. If that copy is what fails, `op` met no fault.
        let read = file.read_at(&mut left, 0);
        let _ = file.write_at(b"0", 0);
        self.injected.set(read.is_ok() && left.starts_with(b"0\n"));
        Ok(result)
    }

    /// The result of `op`, or `None` if it failed with one of `errnos` because of the fault.
    fn call<T>(&self, errnos: &[i32], op: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        match self.during(op)? {
            Ok(value) => Ok(Some(value)),
            Err(err) => {
                let errno = err
                    .downcast_ref::<io::Error>()
                    .and_then(io::Error::raw_os_error);
                ensure!(
                    self.injected.get() && errno.is_some_and(|errno| errnos.contains(&errno)),
                    "{err:#}"
                );
                Ok(None)
            }
        }
    }
}

/// Errors of calls that copy nothing from user space.
const NO_MEMORY: &[i32] = &[libc::ENOMEM];
/// Errors of calls that do: a path, or an argument.
const NO_MEMORY_OR_FAULT: &[i32] = &[libc::ENOMEM, libc::EFAULT];

/// Resource usage of the whole machine. Tests leave it unchanged.
#[derive(Debug, PartialEq)]
struct Usage {
    files: usize,
    references: usize,
    shmem: usize,
    swap_free: usize,
}

impl Usage {
    fn now() -> Result<Self> {
        let files = fs::read_to_string("/proc/sys/fs/file-nr")?;
        let files = files
            .split_whitespace()
            .next()
            .context("file-nr is empty")?;
        Ok(Self {
            files: files.parse()?,
            references: module_refs()?,
            shmem: meminfo("Shmem")?,
            swap_free: meminfo("SwapFree")?,
        })
    }
}

/// Runs `attempt` with its first allocation failing, then its second, and so on, until it makes
/// fewer. Everything it maps at [`PLACE`] is unmapped after each run.
fn fail_each(what: &str, attempt: impl Fn(&Fault) -> Result<()>) -> Result<()> {
    let before = Usage::now()?;
    let mut total = 0;

    loop {
        let fault = Fault {
            nth: total + 1,
            injected: Cell::new(false),
        };
        attempt(&fault).with_context(|| format!("{what}, allocation {}", fault.nth))?;
        place(ROOM).unmap()?;
        if !fault.injected.get() {
            break;
        }
        total += 1;
    }
    ensure!(total > 0, "{what}: no fault was injected");
    println!("{what}: {total} faults");
    count("faults", total.into());
    let after = Usage::now()?;
    ensure!(before == after, "{what}: {before:?} -> {after:?}");
    Ok(())
}

/// Number of pages in memory and in swap.
fn present(fd: &OwnedFd) -> Result<usize> {
    let info = info(fd)?;
    Ok(info.resident + info.swapped)
}

fn expect_present(fd: &OwnedFd, pages: usize, when: &str) -> Result<()> {
    let found = present(fd)?;
    ensure!(found == pages, "{when}: {found} pages, expected {pages}");
    Ok(())
}

/// Address space at [`PLACE`].
fn place(pages: usize) -> Map {
    Map {
        addr: ptr::without_provenance_mut(PLACE),
        pages,
    }
}

/// Address space so far away from [`place`] that it needs other page tables.
fn elsewhere(pages: usize) -> Map {
    place(ROOM).part(ROOM / 2, pages)
}

/// A private mapping of the start of a file.
fn private(fd: &OwnedFd) -> Result<Map> {
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    let to = elsewhere(PAGES);
    Ok(Map::new(to.addr, PAGES, RW, flags, fd.as_raw_fd(), 0)?)
}

/// Runs `body` with each door's name, and its function that makes a file of some number of pages.
fn both_doors(body: impl Fn(&str, &dyn Fn(usize) -> Result<OwnedFd>) -> Result<()>) -> Result<()> {
    body("device", &|_| device())?;
    body("ioctl", &ioctl_file)
}

/// Uses a file, to check that it works.
fn use_and_unmap(fd: &OwnedFd) -> Result<()> {
    let map = place(PAGES).cover(fd, 0)?;
    map.fill(TAG);
    map.check(TAG)?;
    map.unmap()?;
    expect_present(fd, 0, "unmapped")
}

pub fn open_and_ioctl() -> Result<()> {
    let _injection = enable_injection()?;

    fail_each("open", |fault| {
        let dev = fault.call(NO_MEMORY_OR_FAULT, || Ok(open(DEVICE, libc::O_RDWR)?))?;
        dev.map_or(Ok(()), |dev| use_and_unmap(&dev))
    })?;
    fail_each("DEVANON_IOC_NEW", |fault| {
        let dev = device()?;
        let next = || -> Result<i32> { Ok(dev.try_clone()?.as_raw_fd()) };
        let free = next()?;
        let file = fault.call(NO_MEMORY_OR_FAULT, || {
            Ok(ioctl_new(&dev, DEVANON_CLOEXEC, 0)?)
        })?;
        let Some(file) = file else {
            ensure!(next()? == free, "descriptor {free} is lost");
            return use_and_unmap(&ioctl_file(PAGES).context("once more")?);
        };
        truncate(&file, PAGES * PAGE)?;
        use_and_unmap(&file)
    })?;
    fail_each("DEVANON_IOC_NEW, descriptor table full", |fault| {
        // A descriptor table never shrinks, so each run has its own process.
        let mut child = fork(|peer| {
            let dev = device()?;
            let mut last = dev.try_clone()?;
            let mut all = Vec::new();
            // Leaves one of 64 descriptors, for the faulted call.
            while last.as_raw_fd() < 62 {
                all.push(last);
                last = dev.try_clone()?;
            }
            fault.call(NO_MEMORY_OR_FAULT, || Ok(ioctl_new(&dev, 0, 0)?))?;
            if fault.injected.get() {
                peer.meet()?;
            }
            Ok(())
        })?;
        fault.injected.set(child.meet().is_ok());
        child.join()
    })
}

pub fn mmap() -> Result<()> {
    let _injection = enable_injection()?;

    both_doors(|door, file| {
        fail_each(&format!("{door}, mmap"), |fault| {
            let fd = file(PAGES)?;
            fault.call(NO_MEMORY, || place(PAGES).cover(&fd, 0))?;
            use_and_unmap(&fd)
        })?;
        fail_each(&format!("{door}, mmap over pages of it"), |fault| {
            let fd = file(PAGES + 4)?;
            let map = place(PAGES).cover(&fd, 0)?;
            map.fill(TAG);
            let middle = map.part(4, 4);
            let new = fault.call(NO_MEMORY, || middle.cover(&fd, PAGES))?;
            map.part(0, 4).check(TAG)?;
            map.part(8, PAGES - 8).check(TAG + 8)?;
            // If mmap(2) failed late, it left a hole.
            if new.is_none() && middle.advise(libc::MADV_NORMAL).is_ok() {
                expect_present(&fd, PAGES, "not mapped over")?;
                middle.check(TAG + 4)?;
            } else {
                expect_present(&fd, PAGES - 4, "mapped over")?;
                middle.cover(&fd, PAGES)?.check_zero()?;
            }
            map.unmap()?;
            expect_present(&fd, 0, "unmapped")
        })
    })
}

/// A page fault that fails to allocate is retried, as it cannot return an errno. MADV_POPULATE_WRITE
/// can.
pub fn touch() -> Result<()> {
    let _injection = enable_injection()?;

    both_doors(|door, file| {
        // Far into the file through one door, near its start through the other: the code is the same.
        let page = if door == "device" { FAR } else { 1 };
        let name = |how| format!("{door}, {how} at page {page:#x}");
        // The file also has a page at its start.
        let mapped = || -> Result<(OwnedFd, Map)> {
            let fd = file(page + PAGES)?;
            elsewhere(1).cover(&fd, 0)?.write(0, TAG);
            let map = place(PAGES).cover(&fd, page)?;
            Ok((fd, map))
        };
        let end = |fd: &OwnedFd, map: Map| -> Result<()> {
            map.fill(TAG);
            map.check(TAG)?;
            expect_present(fd, 1 + PAGES, "touched")?;
            map.unmap()?;
            expect_present(fd, 1, "unmapped")
        };

        fail_each(&name("write"), |fault| {
            let (fd, map) = mapped()?;
            fault.during(|| map.write(1, TAG + 1))?;
            expect_present(&fd, 2, "written")?;
            ensure!(map.read(1) == TAG + 1, "not what was written");
            end(&fd, map)
        })?;
        fail_each(&name("read"), |fault| {
            let (fd, map) = mapped()?;
            ensure!(fault.during(|| map.read(1))? == 0, "not zero");
            map.check_zero()?;
            end(&fd, map)
        })?;
        fail_each(&name("populate"), |fault| {
            let (fd, map) = mapped()?;
            fault.call(NO_MEMORY, || Ok(map.advise(libc::MADV_POPULATE_WRITE)?))?;
            map.check_zero()?;
            end(&fd, map)
        })?;
        fail_each(&name("read of present pages"), |fault| {
            let (fd, map) = mapped()?;
            elsewhere(PAGES).cover(&fd, page)?.fill(TAG);
            let found = fault.during(|| map.read(1))?;
            ensure!(found == TAG + 1, "{found:#x}");
            map.check(TAG)
        })?;
        fail_each(&format!("{door}, write to a private mapping"), |fault| {
            let fd = file(PAGES)?;
            let shared = place(PAGES).cover(&fd, 0)?;
            shared.fill(TAG);
            let copy = private(&fd)?;
            fault.during(|| copy.write(1, 7))?;
            ensure!(copy.read(1) == 7, "not what was written");
            shared.check(TAG)?;
            copy.unmap()?;
            expect_present(&fd, PAGES, "private unmapped")
        })?;
        fail_each(&format!("{door}, touch of a swapped-out page"), |fault| {
            let (fd, map) = filled(file, PAGES)?;
            page_out(&fd, map)?;
            let found = fault.during(|| map.read(1))?;
            ensure!(found == TAG + 1, "{found:#x}");
            map.check(TAG)?;
            map.unmap()?;
            expect_present(&fd, 0, "unmapped")
        })?;

        let _huge = huge_pages()?;
        fail_each(&format!("{door}, write to a huge page"), |fault| {
            let fd = file(HUGE)?;
            let map = place(HUGE).cover(&fd, 0)?;
            fault.during(|| map.write(1, TAG + 1))?;
            ensure!(map.read(1) == TAG + 1, "not what was written");
            map.part(2, HUGE - 2).check_zero()?;
            map.unmap()?;
            expect_present(&fd, 0, "unmapped")
        })
    })
}

/// A file mapped and filled at [`PLACE`].
fn filled(file: &dyn Fn(usize) -> Result<OwnedFd>, pages: usize) -> Result<(OwnedFd, Map)> {
    let fd = file(pages)?;
    let map = place(pages).cover(&fd, 0)?;
    map.fill(TAG);
    Ok((fd, map))
}

fn filled_huge(file: &dyn Fn(usize) -> Result<OwnedFd>, pages: usize) -> Result<(OwnedFd, Map)> {
    let before = meminfo("ShmemHugePages")?;
    let filled = filled(file, pages)?;
    let huge = meminfo("ShmemHugePages")? - before;
    ensure!(huge == pages, "{huge} of {pages} pages are huge");
    Ok(filled)
}

/// Unmaps `pages` pages of `map` from `first` on, with a fault: all of them go, or none. The rest
/// stays.
fn unmap_part(fault: &Fault, fd: &OwnedFd, map: Map, first: usize, pages: usize) -> Result<()> {
    let part = map.part(first, pages);
    let rest = first + pages;
    let unmapped = fault.call(NO_MEMORY, || part.unmap())?.is_some();
    // Without memory, a huge page may stay unsplit. Its part is zeroed, and freed with the rest.
    let left = present(fd)?;
    let lowest = if unmapped {
        map.pages - pages
    } else {
        map.pages
    };
    ensure!(
        left == lowest || (map.pages >= HUGE && fault.injected.get() && left > lowest),
        "{left} pages, expected {lowest}"
    );
    map.part(0, first).check(TAG)?;
    map.part(rest, map.pages - rest).check(TAG + rest as u64)?;
    if unmapped {
        part.cover(fd, first)?.check_zero()?;
    } else {
        part.check(TAG + first as u64)?;
    }
    map.unmap()?;
    expect_present(fd, 0, "all unmapped")
}

pub fn munmap() -> Result<()> {
    let _injection = enable_injection()?;

    both_doors(|door, file| {
        for (name, first, pages) in [("all", 0, PAGES), ("the head", 0, 5), ("the middle", 5, 6)] {
            fail_each(&format!("{door}, munmap of {name}"), |fault| {
                let (fd, map) = filled(file, PAGES)?;
                unmap_part(fault, &fd, map, first, pages)
            })?;
            fail_each(&format!("{door}, munmap of {name}, swapped out"), |fault| {
                let (fd, map) = filled(file, PAGES)?;
                page_out(&fd, map)?;
                unmap_part(fault, &fd, map, first, pages)
            })?;
        }
        Ok(())
    })
}

pub fn munmap_of_huge_pages() -> Result<()> {
    let _injection = enable_injection()?;
    let _huge = huge_pages()?;

    both_doors(|door, file| {
        fail_each(&format!("{door}, munmap of part of a huge page"), |fault| {
            let (fd, map) = filled_huge(file, HUGE)?;
            unmap_part(fault, &fd, map, 100, 28)
        })?;
        fail_each(&format!("{door}, munmap across two huge pages"), |fault| {
            let (fd, map) = filled_huge(file, 2 * HUGE)?;
            unmap_part(fault, &fd, map, HUGE - 10, 20)
        })?;
        fail_each(
            &format!("{door}, munmap of part of a swapped-out huge page"),
            |fault| {
                let (fd, map) = filled_huge(file, HUGE)?;
                page_out(&fd, map)?;
                unmap_part(fault, &fd, map, 100, 28)
            },
        )
    })
}

/// Only the mapping holds the file, so everything goes with it.
pub fn munmap_after_close() -> Result<()> {
    let _injection = enable_injection()?;

    both_doors(|door, file| {
        fail_each(&format!("{door}, munmap after close"), |fault| {
            let (fd, map) = filled(file, PAGES)?;
            drop(fd);
            if fault.call(NO_MEMORY, || map.unmap())?.is_none() {
                map.check(TAG)?;
            }
            Ok(())
        })
    })
}

pub fn exit() -> Result<()> {
    let _injection = enable_injection()?;

    fail_each("exit", |fault| {
        let (dev, map) = filled(&|_| device(), PAGES)?;
        // SAFETY: Tests are single-threaded when they fork, so the child may call anything.
        let pid = cvt(unsafe { libc::fork() })?;
        if pid == 0 {
            // Besides the shared object, the child has one of its own.
            let own = ioctl_file(PAGES).and_then(|own| elsewhere(PAGES).cover(&own, 0));
            let status = own.map_or(1, |map| {
                map.fill(TAG);
                0
            });
            // SAFETY: Ends the child.
            fault.during(|| unsafe { libc::_exit(status) })?;
        }
        // The zombie still reports whether a fault was injected.
        // SAFETY: Our own child; all zero is a valid `siginfo_t`, which the kernel writes.
        unsafe {
            let mut info = std::mem::zeroed::<libc::siginfo_t>();
            let flags = libc::WEXITED | libc::WNOWAIT;
            cvt(libc::waitid(libc::P_PID, pid as u32, &mut info, flags))?;
        }
        let left = fs::read_to_string(format!("/proc/{pid}/fail-nth"))?;
        fault.injected.set(left.trim() == "0");
        let status = wait(pid)?;
        ensure!(status == 0, "child: status {status:#x}");
        expect_present(&dev, PAGES, "child gone")?;
        map.check(TAG)
    })
}

pub fn mremap() -> Result<()> {
    let _injection = enable_injection()?;
    const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;

    both_doors(|door, file| {
        // The first page and number of pages to remap, and the new number of pages.
        for (name, first, pages, wanted, flags) in [
            ("moves", 0, PAGES, PAGES, MOVE),
            ("moves the middle", 4, 8, 8, MOVE),
            ("moves and grows", 0, PAGES, 2 * PAGES, MOVE),
            ("shrinks", 0, PAGES, 4, 0),
        ] {
            fail_each(&format!("{door}, mremap {name}"), |fault| {
                let fd = file(2 * PAGES)?;
                let map = place(PAGES).cover(&fd, 0)?;
                map.fill(TAG);
                let to = elsewhere(1).addr;
                let part = map.part(first, pages);
                let moved = fault.call(NO_MEMORY, || Ok(part.remap(wanted, flags, to)?))?;
                let kept = wanted.min(pages);
                match moved {
                    Some(new) => {
                        expect_present(&fd, PAGES - pages + kept, "moved")?;
                        new.part(0, kept).check(TAG + first as u64)?;
                        new.part(kept, wanted - kept).check_zero()?;
                        new.unmap()?;
                    }
                    None => {
                        expect_present(&fd, PAGES, "not moved")?;
                        map.check(TAG)?;
                    }
                }
                map.part(0, first).check(TAG)?;
                map.unmap()?;
                expect_present(&fd, 0, "unmapped")
            })?;
        }
        Ok(())
    })
}

pub fn mprotect() -> Result<()> {
    let _injection = enable_injection()?;

    both_doors(|door, file| {
        fail_each(&format!("{door}, mprotect of the middle"), |fault| {
            let (fd, map) = filled(file, PAGES)?;
            fault.call(NO_MEMORY, || Ok(map.part(4, 8).protect(libc::PROT_READ)?))?;
            expect_present(&fd, PAGES, "protected, or not")?;
            map.check(TAG)?;
            map.unmap()?;
            expect_present(&fd, 0, "unmapped")
        })
    })
}

/// A fork that fails halfway closes the mappings it has copied so far.
pub fn fork_process() -> Result<()> {
    let _injection = enable_injection()?;

    fail_each("fork", |fault| {
        let (dev, map) = filled(&|_| device(), PAGES)?;
        let copy = private(&dev)?;
        copy.fill(7);
        let child = fault.call(NO_MEMORY, || {
            // SAFETY: Tests are single-threaded when they fork, so the child may call anything.
            let pid = cvt(unsafe { libc::fork() })?;
            if pid == 0 {
                let right = map.check(TAG).and_then(|()| copy.check(7));
                // SAFETY: Ends the child.
                unsafe { libc::_exit(i32::from(right.is_err())) };
            }
            Ok(pid)
        })?;
        if let Some(pid) = child {
            let status = wait(pid)?;
            ensure!(status == 0, "child: status {status:#x}");
        }
        expect_present(&dev, PAGES, "forked, or not")?;
        map.check(TAG)?;
        copy.check(7)?;
        map.unmap()?;
        expect_present(&dev, PAGES, "covered by the private mapping")?;
        copy.unmap()?;
        expect_present(&dev, 0, "unmapped")
    })
}

/// On drop, loads the module again if it is not loaded.
struct Reload;

impl Drop for Reload {
    fn drop(&mut self) {
        if !Path::new("/sys/module/devanon").exists() {
            let _ = load(MODULE, "");
        }
    }
}

fn expect_unloaded() -> Result<()> {
    for path in ["/sys/module/devanon", "/sys/class/devanon", DEVICE] {
        ensure!(!fs::exists(path)?, "{path} still exists");
    }
    Ok(())
}

/// Keeps KUnit from running the module's unit tests at each load: here allocations fail, or the
/// module is loaded a thousand times.
fn disable_unit_tests() -> Result<Option<Setting>> {
    let filter = "/sys/module/kunit/parameters/filter_glob";
    if !fs::exists(filter)? {
        return Ok(None);
    }
    // Equivalent to the initial null, but can be restored.
    fs::write(filter, "*")?;
    Setting::set(filter, "none").map(Some)
}

pub fn insmod_and_rmmod() -> Result<()> {
    need_module()?;
    let _quiet = disable_unit_tests()?;
    let _injection = enable_injection()?;
    // The module loader allocates hundreds of pages. The driver allocates only from slabs.
    let _slabs = Setting::set("/sys/kernel/debug/fail_page_alloc/min-order", "11")?;
    let _reload = Reload;

    fail_each("rmmod", |fault| {
        let gone = fault.call(NO_MEMORY_OR_FAULT, || Ok(unload("devanon")?))?;
        if gone.is_some() {
            expect_unloaded()?;
            load(MODULE, "")?;
        }
        use_and_unmap(&device()?)
    })?;
    unload("devanon")?;
    fail_each("insmod", |fault| {
        let loaded = fault.call(NO_MEMORY_OR_FAULT, || Ok(load(MODULE, "")?))?;
        if loaded.is_some() {
            use_and_unmap(&device()?)?;
            unload("devanon")?;
        }
        expect_unloaded()
    })
}

/// Uses the module as soon as it is loaded, once per round number in the first page of `board`, until
/// that is [`STOP`]. Counts its uses in its own page of `board`.
fn use_each_load(board: Map, user: usize) -> Result<()> {
    // One user runs as root and makes its own node; the others are unprivileged.
    let own = format!("/dev/anon-{}", process::id());
    let path = if user == 0 { &own } else { DEVICE };
    if user != 0 {
        // SAFETY: No memory involved.
        unsafe {
            cvt(libc::setgid(1000))?;
            cvt(libc::setuid(1000))?;
        }
    }

    loop {
        let round = board.read(0);
        if round == STOP {
            return Ok(());
        }
        if user == 0 {
            mknod(path)?;
        }
        let dev = open(path, libc::O_RDWR);
        if user == 0 {
            fs::remove_file(path)?;
        }
        match dev {
            Ok(dev) => {
                let map = place(PAGES).cover(&dev, 0)?;
                map.fill(TAG);
                let file = ioctl_new(&dev, 0, 0)?;
                drop(dev);
                truncate(&file, PAGES * PAGE)?;
                Map::shared(&file, PAGES, 0)?.unmap()?;
                drop(file);
                // Only the mapping pins the module now.
                map.check(TAG)?;
                map.unmap()?;
                board.write(user + 1, board.read(user + 1) + 1);
                while board.read(0) == round {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            // EACCES: devtmpfs first makes the node, then sets its mode.
            Err(err) => ensure!(
                matches!(
                    err.raw_os_error(),
                    Some(libc::ENOENT | libc::ENXIO | libc::EACCES)
                ),
                "open: {err}"
            ),
        }
        thread::sleep(Duration::from_micros(fastrand::u64(..1000)));
    }
}

const STOP: u64 = u64::MAX;

/// Loads and unloads the module 1,000 times, or as often as 20 seconds (or `seconds`, if longer)
/// allow.
pub fn load_and_unload_a_thousand_times(seconds: u64) -> Result<()> {
    need_module()?;
    const USERS: usize = 4;
    const TIMES: u64 = 1000;
    let budget = Duration::from_secs(seconds.max(20));
    let patient = Duration::from_secs(60);
    let _quiet = disable_unit_tests()?;
    let _reload = Reload;
    unload("devanon")?;
    let before = Usage::now()?;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let board = Map::new(ptr::null_mut(), USERS + 1, RW, flags, -1, 0)?;
    let uses = || (1..=USERS).map(|user| board.read(user)).sum::<u64>();
    let users = (0..USERS)
        .map(|user| fork(|_| use_each_load(board, user)))
        .collect::<Result<Vec<_>>>()?;

    let mut refused = 0;
    let mut times = 0;
    let begin = Instant::now();
    let mut rounds = || -> Result<()> {
        while times < TIMES && begin.elapsed() < budget {
            let time = times;
            let used = uses();
            board.write(0, time);
            load(MODULE, "").with_context(|| format!("load {time}"))?;
            let start = Instant::now();
            // Every tenth time, waits until some process has used the module.
            while time % 10 == 0 && uses() == used && start.elapsed() < patient {
                thread::sleep(Duration::from_millis(1));
            }
            thread::sleep(Duration::from_micros(fastrand::u64(..3000)));
            while let Err(err) = unload("devanon") {
                ensure!(
                    err.raw_os_error() == Some(libc::EAGAIN) && start.elapsed() < 2 * patient,
                    "unload {time}: {err}"
                );
                refused += 1;
                thread::yield_now();
            }
            expect_unloaded()?;
            times += 1;
        }
        Ok(())
    };
    let done = rounds();
    board.write(0, STOP);
    let ends: Vec<_> = users.into_iter().map(Peer::join).collect();
    done?;
    ends.into_iter().collect::<Result<Vec<()>>>()?;

    let uses = uses();
    println!("loaded {times} times, used {uses} times, unload refused {refused} times");
    ensure!(uses >= times / 10, "the module was hardly used");
    board.unmap()?;
    let after = Usage::now()?;
    ensure!(before == after, "{before:?} -> {after:?}");
    count("operations", 2 * times + uses);
    Ok(())
}
