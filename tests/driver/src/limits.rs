// SPDX-License-Identifier: GPL-2.0

//! Large numbers of everything, and what happens at each limit.
//!
//! Where the driver has to behave like any tmpfs file, a memfd goes through the same steps, and the
//! results have to be the same.

use crate::sys::*;
use anyhow::{Context, Result, bail, ensure};
use libc::{EFBIG, ENFILE, ENOMEM, c_int};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use std::{fs, io, mem, ptr, thread};

/// The tag tests fill pages with.
const TAG: u64 = 0x11e1_7000_0000_0000;

/// Waits until `check` succeeds. Much is freed a little later: by RCU, by a worker, or when the last
/// reader of some `/proc` file is done.
fn eventually(mut check: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        match check() {
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(100)),
            result => return result,
        }
    }
}

/// Resource usage before a test. Processes that have exited must not have kept any of it.
struct Baseline {
    refs: usize,
    files: usize,
    pages: usize,
    objects: BTreeMap<String, usize>,
}

impl Baseline {
    fn take() -> Result<Self> {
        // Small caches do not matter, and shrinking is slow under KASAN.
        for (cache, _) in objects()?.iter().filter(|(_, objects)| **objects > 500) {
            shrink(cache);
        }
        Ok(Self {
            refs: module_refs()?,
            files: file_nr()?,
            pages: shared_pages()?,
            objects: objects()?,
        })
    }

    /// Fails unless usage returns to this after `opens` opens: no additional module reference, file
    /// or page, apart from a few of other processes. If each open leaked one object of any kind, its
    /// slab cache would have `opens` more. Up to half as many are tolerated, since others use the
    /// caches as well.
    fn expect_restored(&self, opens: usize) -> Result<()> {
        eventually(|| {
            let (refs, files, pages) = (module_refs()?, file_nr()?, shared_pages()?);
            ensure!(
                refs == self.refs,
                "module: {} -> {refs} references",
                self.refs
            );
            ensure!(files <= self.files + 8, "{} -> {files} files", self.files);
            ensure!(pages <= self.pages + 64, "{} -> {pages} pages", self.pages);
            for (cache, after) in objects()? {
                let before = self.objects.get(&cache).copied().unwrap_or(0);
                if after >= before + (opens / 2).max(1000) {
                    shrink(&cache);
                    bail!("slab cache {cache}: {before} -> {after} objects");
                }
            }
            Ok(())
        })
    }
}

/// Exact number of files open on this machine.
fn file_nr() -> Result<usize> {
    let text = fs::read_to_string("/proc/sys/fs/file-nr")?;
    Ok(text.split_whitespace().next().context("file-nr")?.parse()?)
}

/// Pages of shared memory and of swap in use.
fn shared_pages() -> Result<usize> {
    Ok(meminfo("Shmem")? + meminfo("SwapTotal")? - meminfo("SwapFree")?)
}

/// Objects in use, by slab cache. Free objects that a CPU caches count as in use.
fn objects() -> Result<BTreeMap<String, usize>> {
    fs::read_to_string("/proc/slabinfo")?
        .lines()
        .skip(2)
        .map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next().context("slabinfo")?;
            let active = words.next().context("slabinfo")?;
            Ok((name.to_owned(), active.parse()?))
        })
        .collect()
}

/// Makes CPUs, and KASAN's quarantine, give back the free objects of this cache that they hold.
fn shrink(cache: &str) {
    let _ = fs::write(format!("/sys/kernel/slab/{cache}/shrink"), "1");
}

fn set_limit(resource: libc::__rlimit_resource_t, limit: u64) -> Result<()> {
    let limit = libc::rlimit {
        rlim_cur: limit,
        rlim_max: limit,
    };
    // SAFETY: The kernel reads the limit.
    cvt(unsafe { libc::setrlimit(resource, &limit) }).context("setrlimit")?;
    Ok(())
}

/// Drops root and its privileges.
fn drop_root() -> Result<()> {
    // SAFETY: No memory involved.
    unsafe {
        cvt(libc::setgroups(0, ptr::null()))?;
        cvt(libc::setgid(1000))?;
        cvt(libc::setuid(1000))?;
    }
    Ok(())
}

fn map(fd: &OwnedFd, pages: usize, page: usize, flags: c_int) -> io::Result<Map> {
    Map::new(ptr::null_mut(), pages, RW, flags, fd.as_raw_fd(), page)
}

/// The result as an errno: 0 for success.
fn errno<T>(result: io::Result<T>) -> c_int {
    result.map_or_else(|err| err.raw_os_error().unwrap_or(-1), |_| 0)
}

/// Steps and the errno of each.
type Results = Vec<(&'static str, c_int)>;

/// Runs `steps` on a memfd of `pages` pages and then through both doors, each in its own process.
/// Fails unless each run returns the `expected` results and usage returns to the baseline. `steps`
/// gets the file, and whether it is the driver's.
fn same_as_memfd(
    pages: usize,
    expected: &[c_int],
    steps: impl Fn(&OwnedFd, bool) -> Result<Results>,
) -> Result<()> {
    let baseline = Baseline::take()?;
    let doors: [(_, &dyn Fn() -> Result<OwnedFd>); 3] = [
        ("a memfd", &|| memfd(pages)),
        ("the device", &device),
        ("a file of the ioctl", &|| ioctl_file(pages)),
    ];
    for (number, (door, open)) in doors.into_iter().enumerate() {
        fork(|_| {
            let results = steps(&open()?, number > 0)?;
            let found: Vec<_> = results.iter().map(|(_, errno)| *errno).collect();
            ensure!(found == expected, "{results:?}, expected {expected:?}");
            Ok(())
        })?
        .join()
        .context(door)?;
    }
    baseline.expect_restored(0)
}

/// Checks the number of resident pages of `fd`, if it is the driver's: no other file reports it.
fn expect_pages(fd: &OwnedFd, ours: bool, pages: usize, when: &str) -> Result<()> {
    if ours {
        expect_resident(fd, pages, when)?;
    }
    Ok(())
}

/// `words` words that this process shares with those it forks, each in its own page.
fn shared_words(words: usize) -> Result<Map> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    Ok(Map::new(ptr::null_mut(), words, RW, flags, -1, 0)?)
}

/// 64 processes with 1,000 objects each, of one page or two. Some unmap, some only close, some
/// exit, some are killed. No page changes while in use, and all are freed.
/// A slow machine (with KASAN, say) makes fewer objects, at least 10 per process; the test prints
/// how many.
pub fn many_objects_of_many_processes() -> Result<()> {
    const PROCESSES: usize = 64;
    const OBJECTS: usize = 1000;
    const LEAST: usize = 10;
    let tag = |process: usize, object: usize| TAG + ((process * OBJECTS + object) << 8) as u64;
    let baseline = Baseline::take()?;
    let start = Instant::now();
    let made = shared_words(PROCESSES)?;
    let work = |process: usize, peer: &mut Peer| -> Result<()> {
        set_limit(libc::RLIMIT_NOFILE, OBJECTS as u64 + 100)?;
        // 64 busy processes must not starve low-priority kernel threads: kmemleak's scan holds RCU.
        // SAFETY: No memory involved.
        cvt(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) })?;
        let mut files = Vec::new();
        let mut maps = Vec::new();
        while maps.len() < LEAST || maps.len() < OBJECTS && start.elapsed().as_secs() < 90 {
            let object = maps.len();
            let pages = 1 + object % 2;
            let file = if process % 8 < 4 {
                device()?
            } else {
                ioctl_file(object + pages)?
            };
            let map = Map::shared(&file, pages, object)?;
            ensure!(map.read(0) == 0, "a new object is not empty");
            map.fill(tag(process, object));
            files.push(file);
            maps.push(map);
        }
        made.write(process, maps.len() as u64);
        // First all processes have their objects, then the parent has counted the pages.
        peer.meet()?;
        peer.meet()?;
        for (object, map) in maps.iter().enumerate() {
            map.check(tag(process, object))
                .with_context(|| format!("process {process}, object {object}"))?;
        }
        match process % 4 {
            0 => maps.into_iter().try_for_each(Map::unmap)?,
            1 => drop(files),
            2 => mem::forget(files),
            _ => {
                peer.meet()?;
                // The parent kills this process here.
                peer.meet()?;
            }
        }
        Ok(())
    };

    let mut peers = (0..PROCESSES)
        .map(|process| fork(|peer| work(process, peer)))
        .collect::<Result<Vec<_>>>()?;
    peers.iter_mut().try_for_each(Peer::meet)?;
    let objects: Vec<_> = (0..PROCESSES)
        .map(|process| made.read(process) as usize)
        .collect();
    // Every other object has two pages. `made` itself has one per process.
    let pages = objects.iter().map(|n| n + n / 2).sum::<usize>() + PROCESSES;
    let more = shared_pages()?.saturating_sub(baseline.pages);
    ensure!(
        more.abs_diff(pages) < 64,
        "{more} more pages, {pages} touched"
    );
    let objects: usize = objects.iter().sum();
    println!("{objects} objects made in {:.1?}", start.elapsed());
    peers.iter_mut().try_for_each(Peer::meet)?;
    for (process, mut peer) in peers.into_iter().enumerate() {
        if process % 4 == 3 {
            peer.meet()?;
            peer.kill()?;
        } else {
            peer.join()?;
        }
    }
    made.unmap()?;
    baseline.expect_restored(objects)?;
    println!("all freed after {:.1?}", start.elapsed());
    count("pages", pages as u64);
    Ok(())
}

/// One process has 100,000 mappings of a page each, which go away at exit or with one munmap(2).
/// Kernels that check all mappings of a process at every mmap(2) (DEBUG_VM_MAPLE_TREE) would take
/// hours for that: they get as many as fit into half a minute. The test prints how many.
pub fn many_mappings_of_one_process() -> Result<()> {
    const MANY: usize = 100_000;
    const LEAST: usize = 1000;
    let _limit = Setting::set("/proc/sys/vm/max_map_count", 2 * MANY)?;
    let device = device()?;
    // The first mapping creates the memory, which holds a reference to the module from then on.
    Map::shared(&device, 1, 0)?.unmap()?;
    for (door, fd, at_once) in [
        ("the device", device, false),
        ("a file of the ioctl", ioctl_file(2 * MANY)?, true),
    ] {
        let baseline = Baseline::take()?;
        let made = shared_words(1)?;
        let start = Instant::now();
        let mut child = fork(|peer| {
            let before = vma_count()?;
            // Finds room for all, but gives it up again: mapping over a reservation costs more.
            let place = Map::reserve(MANY)?;
            place.unmap()?;
            let mut mapped = 0;
            while mapped < LEAST || mapped < MANY && start.elapsed().as_secs() < 30 {
                // Every other page of the file, so that the VMAs never merge.
                let map = place.part(mapped, 1).cover(&fd, 2 * mapped)?;
                map.write(0, TAG + mapped as u64);
                mapped += 1;
            }
            let count = vma_count()? - before;
            ensure!(count >= mapped, "{mapped} mappings are {count} VMAs");
            let place = place.part(0, mapped);
            place.check(TAG)?;
            made.write(0, mapped as u64);
            peer.meet()?;
            peer.meet()?;
            if at_once {
                place.unmap()?;
                peer.meet()?;
                peer.meet()?;
            }
            Ok(())
        })?;
        child.meet()?;
        let mapped = made.read(0) as usize;
        expect_resident(&fd, mapped, "mapped")?;
        println!("{door}: {mapped} mappings made in {:.1?}", start.elapsed());
        let start = Instant::now();
        child.meet()?;
        if at_once {
            child.meet()?;
            expect_resident(&fd, 0, "unmapped in one call")?;
            child.meet()?;
        }
        child.join()?;
        expect_resident(&fd, 0, "the process is gone")?;
        println!("{door}: freed in {:.1?}", start.elapsed());
        count("pages", mapped as u64);
        made.unmap()?;
        baseline.expect_restored(mapped)?;
    }
    Ok(())
}

/// Four processes make 1,000 opens per second in total, and map and touch a page of each. This runs
/// for as long as the race test (10 s by default), but at most a minute. The number of opens matters,
/// not the rate: a slow machine makes fewer, and the test prints how many. There are at least 2,000,
/// so that a leak of one object per open stands out.
pub fn sustained_opens(seconds: u64) -> Result<()> {
    const PROCESSES: usize = 4;
    const PER_SECOND: usize = 1000;
    const LEAST: usize = 2000;
    let seconds = seconds.clamp(1, 60);
    let most = LEAST.max(PER_SECOND * seconds as usize) / PROCESSES;
    let opens = shared_words(PROCESSES)?;

    let baseline = Baseline::take()?;
    let start = Instant::now();
    let work = |process: usize| -> Result<()> {
        for open in 0..most {
            let now = start.elapsed();
            if open >= LEAST / PROCESSES && now.as_secs() >= seconds {
                break;
            }
            let due = Duration::from_micros((open * PROCESSES * 1_000_000 / PER_SECOND) as u64);
            thread::sleep(due.saturating_sub(now));
            let file = if open % 2 == 0 {
                device()?
            } else {
                ioctl_file(1)?
            };
            let map = Map::shared(&file, 1, 0)?;
            ensure!(map.read(0) == 0, "a new object is not empty");
            map.write(0, TAG);
            if open % 4 < 2 {
                drop(file);
            }
            ensure!(map.read(0) == TAG, "lost");
            map.unmap()?;
            opens.write(process, open as u64 + 1);
        }
        Ok(())
    };
    let peers = (0..PROCESSES)
        .map(|process| fork(|_| work(process)))
        .collect::<Result<Vec<_>>>()?;
    peers.into_iter().try_for_each(Peer::join)?;
    let made: u64 = (0..PROCESSES).map(|process| opens.read(process)).sum();
    println!("{made} opens in {:.1?}", start.elapsed());
    count("operations", made);
    baseline.expect_restored(made as usize)
}

/// A process opens files until it is out of descriptors: EMFILE, at the same number as with
/// /dev/null, and what it has stays intact.
pub fn descriptors_of_a_process() -> Result<()> {
    const LIMIT: usize = 256;
    let baseline = Baseline::take()?;
    let open: [fn(&OwnedFd) -> io::Result<OwnedFd>; 3] = [
        |_| open("/dev/null", libc::O_RDONLY),
        |_| open(DEVICE, libc::O_RDWR),
        |dev| {
            let file = ioctl_new(dev, DEVANON_CLOEXEC, 0)?;
            truncate(&file, PAGE)?;
            Ok(file)
        },
    ];
    for (door, open) in open.into_iter().enumerate() {
        fork(|_| {
            set_limit(libc::RLIMIT_NOFILE, LIMIT as u64)?;
            let dev = device()?;
            // Every descriptor below the limit is usable, and none beyond it.
            let free = LIMIT - open_descriptors()?;
            let mut files = Vec::new();
            let mut maps = Vec::new();
            for number in 0..free {
                let file = open(&dev).with_context(|| format!("{number} of {free}"))?;
                if door > 0 {
                    let map = Map::shared(&file, 1, 0)?;
                    map.write(0, TAG + number as u64);
                    maps.push(map);
                }
                files.push(file);
            }
            for _ in 0..100 {
                expect_errno("one too many", open(&dev), libc::EMFILE)?;
            }
            let map = Map::shared(&dev, 4, 0)?;
            map.fill(TAG);
            map.check(TAG)?;
            for (number, map) in maps.iter().enumerate() {
                ensure!(map.read(0) == TAG + number as u64, "file {number} changed");
            }
            files.pop();
            open(&dev).context("after one was closed")?;
            Ok(())
        })?
        .join()
        .with_context(|| format!("door {door}"))?;
    }
    baseline.expect_restored(0)
}

/// Number of descriptors this process has open.
fn open_descriptors() -> Result<usize> {
    // One of them is for reading the directory.
    Ok(fs::read_dir("/proc/self/fd")?.count() - 1)
}

/// The lowest free descriptor. Needs no free file, so it works at the file limit.
fn free_descriptor(fd: &OwnedFd) -> Result<RawFd> {
    // SAFETY: No memory involved; the descriptor made is closed at once.
    unsafe {
        let free = cvt(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD, 0))?;
        cvt(libc::close(free))?;
        Ok(free)
    }
}

/// The machine has no file left for an unprivileged user: ENFILE from an open of the device and from
/// the ioctl, each of which takes one file.
pub fn files_of_the_machine() -> Result<()> {
    /// The kernel's count is only exact to within some files per CPU, so not every try succeeds.
    const TRIES: usize = 50;
    let baseline = Baseline::take()?;
    let child = {
        let _limit = Setting::set("/proc/sys/fs/file-max", file_nr()? + 300)?;
        let child = fork(|_| {
            set_limit(libc::RLIMIT_NOFILE, 4096)?;
            drop_root()?;
            let null = || open("/dev/null", libc::O_RDONLY);
            let dev = device()?;
            let map = Map::shared(&dev, 16, 0)?;
            map.fill(TAG);
            let mut halfway = 0;
            for _ in 0..TRIES {
                let mut files = Vec::new();
                loop {
                    match null() {
                        Ok(file) => files.push(file),
                        full => break expect_errno("/dev/null", full, ENFILE)?,
                    }
                }
                // Frees one file at a time, until both doors open.
                loop {
                    let free = free_descriptor(&dev)?;
                    let one = null().is_ok();
                    let results = [
                        errno(ioctl_new(&dev, DEVANON_CLOEXEC, 0)),
                        errno(open(DEVICE, libc::O_RDWR)),
                    ];
                    ensure!(free_descriptor(&dev)? == free, "a descriptor was lost");
                    match results {
                        [0, 0] => break,
                        [0, ENFILE] if one => halfway += 1,
                        [ENFILE, ENFILE] => {}
                        _ => bail!("{results:?}"),
                    }
                    // The existing object still works.
                    map.check(TAG)?;
                    let second = Map::shared(&dev, 1, 16)?;
                    second.write(0, 1);
                    second.unmap()?;
                    files.pop().context("nothing opens")?;
                }
                drop(files);
                Map::shared(&device()?, 4, 0)?.fill(TAG);
                if halfway > 0 {
                    break;
                }
            }
            expect_resident(&dev, 16, "at the end")?;
            println!("{halfway} times the ioctl got a file, but not the open after it");
            Ok(())
        })?;
        child.join()
    };
    child?;
    baseline.expect_restored(0)
}

/// No address space left (RLIMIT_AS): ENOMEM, and what is mapped stays mapped.
pub fn address_space() -> Result<()> {
    let expected = [ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, 0, 0];
    same_as_memfd(8192, &expected, |fd, ours| {
        let place = Map::reserve(8192)?;
        let kept = place.part(0, 64).cover(fd, 0)?;
        kept.fill(TAG);
        place.part(64, 8192 - 64).unmap()?;
        let statm = fs::read_to_string("/proc/self/statm")?;
        let pages: usize = statm.split(' ').next().context("statm")?.parse()?;
        set_limit(libc::RLIMIT_AS, ((pages + 256) * PAGE) as u64)?;

        let unchanged = |result: c_int| -> Result<c_int> {
            expect_pages(fd, ours, 64, "at the limit")?;
            kept.check(TAG)?;
            Ok(result)
        };
        let shared = libc::MAP_SHARED;
        let none = Map { pages: 0, ..kept };
        let over = Map {
            pages: 4096,
            ..kept
        };
        let mut results = vec![
            ("shared", unchanged(errno(map(fd, 4096, 0, shared)))?),
            (
                "private",
                unchanged(errno(map(fd, 4096, 0, libc::MAP_PRIVATE)))?,
            ),
            ("grow", {
                unchanged(errno(kept.remap(
                    4096,
                    libc::MREMAP_MAYMOVE,
                    ptr::null_mut(),
                )))?
            }),
            ("second", {
                unchanged(errno(none.remap(
                    4096,
                    libc::MREMAP_MAYMOVE,
                    ptr::null_mut(),
                )))?
            }),
            ("over itself, longer", {
                let flags = shared | libc::MAP_FIXED;
                unchanged(errno(Map::new(
                    over.addr,
                    over.pages,
                    RW,
                    flags,
                    fd.as_raw_fd(),
                    0,
                )))?
            }),
        ];
        // Unmapped address space can be mapped again.
        kept.part(32, 32).unmap()?;
        expect_pages(fd, ours, 32, "half unmapped")?;
        results.push(("small", errno(map(fd, 128, 0, shared))));
        set_limit(libc::RLIMIT_AS, libc::RLIM_INFINITY)?;
        results.push(("no limit", errno(map(fd, 4096, 0, shared))));
        kept.part(0, 32).check(TAG)?;
        Ok(results)
    })
}

/// No VMA left (vm.max_map_count). A call that needs one more fails with ENOMEM and changes nothing;
/// a call that needs none works.
pub fn mappings_of_a_process() -> Result<()> {
    const LIMIT: usize = 300;
    let _limit = Setting::set("/proc/sys/vm/max_map_count", LIMIT)?;
    let expected = [
        ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, 0, 0, 0, 0,
    ];
    same_as_memfd(4096, &expected, |fd, ours| {
        let place = Map::reserve(1024)?;
        let block = place.part(0, 64).cover(fd, 0)?;
        block.fill(TAG);
        // Single pages that cannot merge, until the limit is reached.
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let single = |number: usize| -> io::Result<Map> {
            let addr = place.part(64 + number, 1).addr;
            Map::new(addr, 1, RW, flags, fd.as_raw_fd(), 1000 + 2 * number)
        };
        let mut singles = Vec::new();
        let full = loop {
            match single(singles.len()) {
                Ok(map) => {
                    map.write(0, TAG + singles.len() as u64);
                    singles.push(map);
                }
                full => break errno(full),
            }
        };
        ensure!(singles.len() > LIMIT / 2, "{} mappings", singles.len());
        let unchanged = |result: c_int| -> Result<c_int> {
            expect_pages(fd, ours, 64 + singles.len(), "at the limit")?;
            block.check(TAG)?;
            for (number, map) in singles.iter().enumerate() {
                ensure!(map.read(0) == TAG + number as u64, "single {number}");
            }
            Ok(result)
        };

        let middle = block.part(30, 1);
        let over = |map: Map, fd: RawFd, flags: c_int| {
            errno(Map::new(
                map.addr,
                map.pages,
                RW,
                libc::MAP_FIXED | flags,
                fd,
                500,
            ))
        };
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let mut results = vec![
            ("mmap", unchanged(full)?),
            ("munmap", unchanged(unmap(middle))?),
            (
                "mprotect",
                unchanged(errno(middle.protect(libc::PROT_READ)))?,
            ),
            ("mmap over", {
                unchanged(over(middle, fd.as_raw_fd(), libc::MAP_SHARED))?
            }),
            ("anonymous over", unchanged(over(middle, -1, anonymous))?),
            ("mremap", {
                unchanged(errno(middle.remap(
                    2,
                    libc::MREMAP_MAYMOVE,
                    ptr::null_mut(),
                )))?
            }),
            ("mremap over", {
                unchanged(errno(middle.remap(1, fixed, singles[0].addr)))?
            }),
            ("mlock", {
                // SAFETY: The test's own mapping.
                unchanged(errno(cvt(unsafe { libc::mlock(middle.addr.cast(), PAGE) })))?
            }),
        ];
        // The process forks at its limit, and the child exits.
        fork(|_| unchanged(0).map(drop))?.join()?;
        unchanged(0)?;

        results.push(("munmap of the head", unmap(block.part(0, 1))));
        expect_pages(fd, ours, 63 + singles.len(), "head unmapped")?;
        // mmap(2) can exceed the limit by one, hence two.
        results.push(("munmap of one", unmap(singles[7])));
        results.push(("munmap of another", unmap(singles[9])));
        expect_pages(fd, ours, 61 + singles.len(), "two unmapped")?;
        results.push(("munmap, with one to spare", unmap(middle)));
        expect_pages(fd, ours, 60 + singles.len(), "middle unmapped")?;
        block.part(1, 29).check(TAG + 1)?;
        block.part(31, 33).check(TAG + 31)?;
        place.unmap()?;
        expect_pages(fd, ours, 0, "all unmapped")?;
        Ok(results)
    })
}

/// munmap(2), as an errno.
fn unmap(map: Map) -> c_int {
    // SAFETY: The test's own mapping, which it does not use afterwards.
    errno(cvt(unsafe {
        libc::munmap(map.addr.cast(), map.pages * PAGE)
    }))
}

/// The limit of locked memory (RLIMIT_MEMLOCK).
pub fn locked_memory() -> Result<()> {
    use libc::{EAGAIN, EPERM};
    let before = meminfo("Mlocked")?;
    let expected = [
        0, ENOMEM, ENOMEM, EAGAIN, EAGAIN, ENOMEM, 0, 0, EPERM, EPERM,
    ];
    same_as_memfd(4096, &expected, |fd, ours| {
        set_limit(libc::RLIMIT_MEMLOCK, 16 * PAGE as u64)?;
        drop_root()?;
        let kept = Map::shared(fd, 64, 0)?;
        kept.fill(TAG);
        let lock = |pages: usize, flags: u32| {
            // SAFETY: The test's own mapping.
            errno(cvt(unsafe {
                libc::mlock2(kept.addr.cast(), pages * PAGE, flags)
            }))
        };
        let locked = libc::MAP_SHARED | libc::MAP_LOCKED;
        let mut results = vec![
            ("mlock", lock(8, 0)),
            ("mlock too much", lock(17, 0)),
            ("mlock too much, on fault", lock(17, libc::MLOCK_ONFAULT)),
            ("MAP_LOCKED", errno(map(fd, 9, 100, locked))),
            ("mremap", {
                let flags = libc::MREMAP_MAYMOVE;
                errno(kept.part(0, 8).remap(17, flags, ptr::null_mut()))
            }),
            ("mlockall", {
                // SAFETY: No memory involved.
                errno(cvt(unsafe { libc::mlockall(libc::MCL_CURRENT) }))
            }),
        ];
        expect_pages(fd, ours, 64, "at the limit")?;
        kept.check(TAG)?;
        // Unmapped pages are no longer locked.
        results.push(("munmap", unmap(kept.part(0, 8))));
        expect_pages(fd, ours, 56, "unmapped")?;
        results.push(("MAP_LOCKED of 16", errno(map(fd, 16, 100, locked))));
        expect_pages(fd, ours, 72, "locked, so brought in")?;
        set_limit(libc::RLIMIT_MEMLOCK, 0)?;
        results.push(("mlock, none allowed", lock(8, 0)));
        results.push(("MAP_LOCKED, none allowed", errno(map(fd, 1, 0, locked))));
        kept.part(8, 56).check(TAG + 8)?;
        Ok(results)
    })?;
    eventually(|| {
        // Each CPU batches a few pages; this drains the batches.
        fs::write("/proc/sys/vm/drop_caches", "1")?;
        let after = meminfo("Mlocked")?;
        ensure!(after <= before + 8, "Mlocked: {before} -> {after} pages");
        Ok(())
    })
}

/// The limit of file size (RLIMIT_FSIZE): EFBIG and SIGXFSZ for a file of the ioctl, as for a memfd.
/// It does not apply to the device's memory, which is not written as a file.
pub fn size_of_files() -> Result<()> {
    let baseline = Baseline::take()?;
    let steps = |fd: &OwnedFd| -> Result<Results> {
        set_limit(libc::RLIMIT_FSIZE, 4 * PAGE as u64)?;
        // SAFETY: A set of signals on the stack, made empty before it is used.
        let signals = unsafe {
            let mut signals = mem::zeroed();
            cvt(libc::sigemptyset(&mut signals))?;
            cvt(libc::sigaddset(&mut signals, libc::SIGXFSZ))?;
            cvt(libc::sigprocmask(
                libc::SIG_BLOCK,
                &signals,
                ptr::null_mut(),
            ))?;
            signals
        };
        let signal = || {
            let now = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: The kernel reads the set and the time. Takes a pending signal, if any.
            unsafe { libc::sigtimedwait(&signals, ptr::null_mut(), &now) }
        };
        let kept = Map::shared(fd, 4, 0)?;
        kept.fill(TAG);
        let write = |page: usize| {
            let bytes = [7u8; 2 * PAGE];
            // SAFETY: The kernel reads the bytes.
            let ret = unsafe {
                let at = (page * PAGE) as i64;
                libc::pwrite(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), at)
            };
            // The number of bytes written, or the errno.
            if ret < 0 {
                errno(cvt(-1))
            } else {
                ret as c_int
            }
        };
        let allocate = |pages: usize| {
            // SAFETY: No memory involved.
            errno(cvt(unsafe {
                libc::fallocate(fd.as_raw_fd(), 0, 0, (pages * PAGE) as i64)
            }))
        };
        let results = vec![
            ("truncate to 5 pages", errno(truncate(fd, 5 * PAGE))),
            ("its signal", signal()),
            ("write of pages 4 and 5", write(4)),
            ("its signal", signal()),
            ("allocate 5 pages", allocate(5)),
            ("its signal", signal()),
            ("truncate to 4 pages", errno(truncate(fd, 4 * PAGE))),
            ("allocate 4 pages", allocate(4)),
            ("write of pages 3 and 4", write(3)),
            ("no signal", signal()),
        ];
        ensure!(kept.read(3) == u64::from_ne_bytes([7; 8]), "not written");
        kept.part(0, 3).check(TAG)?;
        Ok(results)
    };
    let expected = [
        EFBIG,
        libc::SIGXFSZ,
        EFBIG,
        libc::SIGXFSZ,
        EFBIG,
        libc::SIGXFSZ,
        0,
        0,
        PAGE as c_int,
        -1,
    ];
    for ours in [false, true] {
        fork(|_| {
            let fd = if ours { ioctl_file(4)? } else { memfd(4)? };
            let results = steps(&fd)?;
            let found: Vec<_> = results.iter().map(|(_, result)| *result).collect();
            ensure!(found == expected, "ours {ours}: {results:?}");
            Ok(())
        })?
        .join()?;
    }
    fork(|_| {
        set_limit(libc::RLIMIT_FSIZE, 0)?;
        let map = Map::shared(&device()?, 64, 1000)?;
        map.fill(TAG);
        map.check(TAG)
    })?
    .join()?;
    baseline.expect_restored(0)
}

const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";

/// How much can be mapped without memory for it. Shared mappings are unlimited, as with a memfd:
/// their pages are accounted when touched. Those of /dev/zero are accounted when mapped, and so are
/// private writable mappings of any file.
pub fn overcommit_of_mappings() -> Result<()> {
    const TERABYTE: usize = (1 << 40) / PAGE;
    let results = |fd: &OwnedFd| {
        let private = libc::MAP_PRIVATE;
        [libc::MAP_SHARED, private, private | libc::MAP_NORESERVE].map(|flags| {
            match map(fd, TERABYTE, 0, flags) {
                Ok(map) => unmap(map),
                err => errno(err),
            }
        })
    };
    for (mode, expected, zero) in [
        (0, [0, ENOMEM, 0], [ENOMEM, ENOMEM, 0]),
        (1, [0, 0, 0], [0, 0, 0]),
        (2, [0, ENOMEM, ENOMEM], [ENOMEM, ENOMEM, ENOMEM]),
    ] {
        let files = [
            (open("/dev/zero", libc::O_RDWR)?, zero),
            (memfd(TERABYTE)?, expected),
            (device()?, expected),
            (ioctl_file(TERABYTE)?, expected),
        ];
        let _mode = Setting::set(OVERCOMMIT, mode)?;
        for (number, (fd, expected)) in files.into_iter().enumerate() {
            let found = results(&fd);
            ensure!(
                found == expected,
                "mode {mode}, file {number}: {found:?}, expected {expected:?}"
            );
        }
    }
    Ok(())
}

/// Pages are accounted when touched. At the limit, a touch is SIGBUS (EFAULT when populated by
/// madvise), as with a memfd; unmapping pages unaccounts them.
pub fn overcommit_of_pages() -> Result<()> {
    // All per-CPU counter batches together add up to this much.
    let slack = meminfo("MemTotal")? / 256 + 256;
    let room = 4 * slack;
    let reserve = fs::read_to_string("/proc/sys/vm/admin_reserve_kbytes")?;
    let reserve = reserve.trim().parse::<usize>()? * 1024 / PAGE;
    let _large_processes_may = Setting::set("/proc/sys/vm/user_reserve_kbytes", 0)?;
    // Shared memory that is accounted when mapped, and never touched. It takes everything except
    // room for this test, and a reserve for root that the rest of the machine needs meanwhile.
    let _always = Setting::set(OVERCOMMIT, 1)?;
    let left = meminfo("CommitLimit")?.saturating_sub(meminfo("Committed_AS")?);
    let ballast = shared_words(left.checked_sub(room + reserve).context("no room")?)?;
    let committed = meminfo("Committed_AS")?;
    let never = Setting::set(OVERCOMMIT, 2)?;

    let many = 2 * room;
    same_as_memfd(many, &[libc::EFAULT, 0], |fd, ours| {
        drop_root()?;
        let all = Map::shared(fd, many, 0)?;
        let (mut touched, step) = (0, 16);
        let full = loop {
            let populated = all.part(touched, step).advise(libc::MADV_POPULATE_WRITE);
            if populated.is_err() || touched + 2 * step > many {
                break errno(populated);
            }
            all.part(touched, step).fill(TAG + touched as u64);
            touched += step;
        };
        ensure!(
            touched.abs_diff(room) < slack,
            "{touched} pages, with room for {room}"
        );
        all.part(0, touched).check(TAG)?;
        all.unmap()?;
        expect_pages(fd, ours, 0, "unmapped")?;
        if !ours {
            truncate(fd, 0)?;
            truncate(fd, many * PAGE)?;
        }
        let again = Map::shared(fd, room - slack, 0)?;
        let result = errno(again.advise(libc::MADV_POPULATE_WRITE));
        Ok(vec![("touch", full), ("touch again", result)])
    })?;
    drop(never);
    eventually(|| {
        let after = meminfo("Committed_AS")?;
        ensure!(
            after < committed + slack / 4,
            "Committed_AS: {committed} -> {after} pages"
        );
        Ok(())
    })?;
    ballast.unmap()
}
