// SPDX-License-Identifier: GPL-2.0

//! Many of everything, and what happens where a limit is reached.
//!
//! Where the answer is "as with any file of tmpfs", a memfd goes through the same steps, and both
//! have to end the same way.

use crate::sys::*;
use anyhow::{Context, Result, bail, ensure};
use libc::{EFBIG, ENFILE, ENOMEM, c_int};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use std::{fs, io, mem, ptr, thread};

/// What tests fill pages with.
const TAG: u64 = 0x11e1_7000_0000_0000;

/// Waits until `check` is content. Much is freed a little later: by RCU, by a worker, or when the
/// last reader of some `/proc` file is done.
fn soon(mut check: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        match check() {
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(100)),
            result => return result,
        }
    }
}

/// What a process that is over may not have kept.
struct Machine {
    refs: usize,
    files: usize,
    pages: usize,
    objects: BTreeMap<String, usize>,
}

impl Machine {
    fn now() -> Result<Self> {
        // A few more or less do not matter, and shrinking takes its time under KASAN.
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

    /// Fails unless the machine comes back to this after `opens` opens: no reference to the module,
    /// no file and no page more, up to a few of other processes. If each open had left one object
    /// of whatever kind, its slab cache would have `opens` more. Half of them is what caches may
    /// have that are in use by others.
    fn expect_back(&self, opens: usize) -> Result<()> {
        soon(|| {
            let (refs, files, pages) = (module_refs()?, file_nr()?, shared_pages()?);
            ensure!(refs == self.refs, "module: {} -> {refs} users", self.refs);
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

/// Files open on this machine, counted exactly.
fn file_nr() -> Result<usize> {
    let text = fs::read_to_string("/proc/sys/fs/file-nr")?;
    Ok(text.split_whitespace().next().context("file-nr")?.parse()?)
}

/// Pages of shared memory, wherever they are.
fn shared_pages() -> Result<usize> {
    Ok(meminfo("Shmem")? + meminfo("SwapTotal")? - meminfo("SwapFree")?)
}

/// Objects in use, by slab cache. Those that some CPU keeps for later count as in use.
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

/// Has CPUs, and the quarantine of KASAN, give back what of this cache they keep.
fn shrink(cache: &str) {
    let _ = fs::write(format!("/sys/kernel/slab/{cache}/shrink"), "1");
}

fn set_limit(resource: libc::__rlimit_resource_t, limit: u64) -> Result<()> {
    let limit = libc::rlimit {
        rlim_cur: limit,
        rlim_max: limit,
    };
    // SAFETY: The limit is ours to read.
    cvt(unsafe { libc::setrlimit(resource, &limit) }).context("setrlimit")?;
    Ok(())
}

/// Gives up being root, and all that comes with it.
fn become_nobody() -> Result<()> {
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

/// What was answered: 0, or the error.
fn errno<T>(result: io::Result<T>) -> c_int {
    result.map_or_else(|err| err.raw_os_error().unwrap_or(-1), |_| 0)
}

/// Steps and what each was answered.
type Answers = Vec<(&'static str, c_int)>;

/// Has a memfd of `pages` pages, and then both doors, go through `steps`, each in a process of its
/// own. Fails unless each gets the `expected` answers, and all comes back.
/// `steps` gets the file, and whether it is one of the driver.
fn as_a_memfd(
    pages: usize,
    expected: &[c_int],
    steps: impl Fn(&OwnedFd, bool) -> Result<Answers>,
) -> Result<()> {
    let machine = Machine::now()?;
    let doors: [(_, &dyn Fn() -> Result<OwnedFd>); 3] = [
        ("a memfd", &|| memfd(pages)),
        ("the device", &device),
        ("a file of the ioctl", &|| ioctl_file(pages)),
    ];
    for (number, (door, open)) in doors.into_iter().enumerate() {
        fork(|_| {
            let answers = steps(&open()?, number > 0)?;
            let found: Vec<_> = answers.iter().map(|(_, errno)| *errno).collect();
            ensure!(found == expected, "{answers:?}, not {expected:?}");
            Ok(())
        })?
        .join()
        .context(door)?;
    }
    machine.expect_back(0)
}

/// Pages of `fd`, if it is a file of the driver, which alone says.
fn expect_pages(fd: &OwnedFd, ours: bool, pages: usize, when: &str) -> Result<()> {
    if ours {
        expect_resident(fd, pages, when)?;
    }
    Ok(())
}

/// A word per process that all those forked from here can write.
fn shared_words(words: usize) -> Result<Map> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    Ok(Map::new(ptr::null_mut(), words, RW, flags, -1, 0)?)
}

/// 64 processes with 1,000 objects each, of one page or two. Some unmap, some only close, some
/// just end, some are killed. Nobody's pages change, and all come back.
/// A machine that is slow (with KASAN, say) makes fewer, 10 at least, and it is said how many.
pub fn many_objects_of_many_processes() -> Result<()> {
    const PROCESSES: usize = 64;
    const OBJECTS: usize = 1000;
    const LEAST: usize = 10;
    let tag = |process: usize, object: usize| TAG + ((process * OBJECTS + object) << 8) as u64;
    let machine = Machine::now()?;
    let start = Instant::now();
    let made = shared_words(PROCESSES)?;
    let work = |process: usize, peer: &mut Peer| -> Result<()> {
        set_limit(libc::RLIMIT_NOFILE, OBJECTS as u64 + 100)?;
        // So many must not starve kernel threads of low priority: kmemleak's holds RCU meanwhile.
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
        // All have all. Then the parent has seen it.
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
                // To be killed.
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
    // Half of them have two pages. And those for the words.
    let pages = objects.iter().map(|n| n + n / 2).sum::<usize>() + PROCESSES;
    let more = shared_pages()?.saturating_sub(machine.pages);
    ensure!(
        more.abs_diff(pages) < 64,
        "{more} pages more, {pages} touched"
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
    machine.expect_back(objects)?;
    println!("all gone after {:.1?}", start.elapsed());
    count("pages", pages as u64);
    Ok(())
}

/// 100,000 mappings in one process, a page each, and its end: by exit, and by one munmap(2).
/// Kernels that look at all mappings of a process at every mmap(2) (DEBUG_VM_MAPLE_TREE) would take
/// hours for so many: then it is as many as fit into half a minute, and said how many.
pub fn many_mappings_of_one_process() -> Result<()> {
    const MANY: usize = 100_000;
    const LEAST: usize = 1000;
    let _limit = Setting::set("/proc/sys/vm/max_map_count", 2 * MANY)?;
    let device = device()?;
    // Its memory is made by the first mapping, and counted as a user of the module from then on.
    Map::shared(&device, 1, 0)?.unmap()?;
    for (door, fd, at_once) in [
        ("the device", device, false),
        ("a file of the ioctl", ioctl_file(2 * MANY)?, true),
    ] {
        let machine = Machine::now()?;
        let made = shared_words(1)?;
        let start = Instant::now();
        let mut child = fork(|peer| {
            let before = vma_count()?;
            // Room for all, given up again so that there is less to do for each.
            let place = Map::reserve(MANY)?;
            place.unmap()?;
            let mut mapped = 0;
            while mapped < LEAST || mapped < MANY && start.elapsed().as_secs() < 30 {
                // Every other page of the file: these never merge.
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
            expect_resident(&fd, 0, "unmapped at once")?;
            child.meet()?;
        }
        child.join()?;
        expect_resident(&fd, 0, "the process is gone")?;
        println!("{door}: gone in {:.1?}", start.elapsed());
        count("pages", mapped as u64);
        made.unmap()?;
        machine.expect_back(mapped)?;
    }
    Ok(())
}

/// 1,000 opens per second, by four processes, each mapping and touching a page. For as long as the
/// race test, a minute at most: 10 s by default, and a minute if that has a minute or more. What
/// counts is how many there were, not how fast; so a slow machine makes fewer, and it is said how
/// many. 2,000 at least, as one object lost per open must stand out.
pub fn opens_for_a_while(seconds: u64) -> Result<()> {
    const PROCESSES: usize = 4;
    const PER_SECOND: usize = 1000;
    const LEAST: usize = 2000;
    let seconds = seconds.clamp(1, 60);
    let most = LEAST.max(PER_SECOND * seconds as usize) / PROCESSES;
    let opens = shared_words(PROCESSES)?;

    let machine = Machine::now()?;
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
    machine.expect_back(made as usize)
}

/// A process opens until it has no descriptor left: EMFILE, as many as with a memfd, and nothing
/// it has is touched.
pub fn descriptors_of_a_process() -> Result<()> {
    const LIMIT: usize = 256;
    let machine = Machine::now()?;
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
            // Every descriptor below the limit can be had, and no other.
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
    machine.expect_back(0)
}

/// Descriptors this process has.
fn open_descriptors() -> Result<usize> {
    // One of them is there for reading the directory.
    Ok(fs::read_dir("/proc/self/fd")?.count() - 1)
}

/// The lowest descriptor that is free. Takes no file, so it can be asked when there is none.
fn free_descriptor(fd: &OwnedFd) -> Result<RawFd> {
    // SAFETY: No memory involved; the descriptor made is closed at once.
    unsafe {
        let free = cvt(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD, 0))?;
        cvt(libc::close(free))?;
        Ok(free)
    }
}

/// The machine has no file left for an unprivileged user: ENFILE. An open of the device takes two
/// files, so the second may be the one that is missing.
pub fn files_of_the_machine() -> Result<()> {
    /// The kernel's count is exact to some files per CPU only, so not every try gets there.
    const TRIES: usize = 50;
    let machine = Machine::now()?;
    let child = {
        let _limit = Setting::set("/proc/sys/fs/file-max", file_nr()? + 300)?;
        let child = fork(|_| {
            set_limit(libc::RLIMIT_NOFILE, 4096)?;
            become_nobody()?;
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
                // One file less at a time, until both doors open.
                loop {
                    let free = free_descriptor(&dev)?;
                    let one = null().is_ok();
                    let answers = [
                        errno(ioctl_new(&dev, DEVANON_CLOEXEC, 0)),
                        errno(open(DEVICE, libc::O_RDWR)),
                    ];
                    ensure!(free_descriptor(&dev)? == free, "a descriptor was lost");
                    match answers {
                        [0, 0] => break,
                        [0, ENFILE] if one => halfway += 1,
                        [ENFILE, ENFILE] => {}
                        _ => bail!("{answers:?}"),
                    }
                    // What is there goes on.
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
            expect_resident(&dev, 16, "after all")?;
            // Others of this machine open files as well, so this may come to nothing.
            println!("{halfway} opens of the device had one file and no second");
            Ok(())
        })?;
        child.join()
    };
    child?;
    machine.expect_back(0)
}

/// No address space left (RLIMIT_AS): ENOMEM, and what is mapped stays mapped.
pub fn address_space() -> Result<()> {
    let expected = [ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, 0, 0];
    as_a_memfd(8192, &expected, |fd, ours| {
        let place = Map::reserve(8192)?;
        let kept = place.part(0, 64).cover(fd, 0)?;
        kept.fill(TAG);
        place.part(64, 8192 - 64).unmap()?;
        let statm = fs::read_to_string("/proc/self/statm")?;
        let pages: usize = statm.split(' ').next().context("statm")?.parse()?;
        set_limit(libc::RLIMIT_AS, ((pages + 256) * PAGE) as u64)?;

        let same = |answer: c_int| -> Result<c_int> {
            expect_pages(fd, ours, 64, "at the limit")?;
            kept.check(TAG)?;
            Ok(answer)
        };
        let shared = libc::MAP_SHARED;
        let none = Map { pages: 0, ..kept };
        let over = Map {
            pages: 4096,
            ..kept
        };
        let mut answers = vec![
            ("shared", same(errno(map(fd, 4096, 0, shared)))?),
            ("private", same(errno(map(fd, 4096, 0, libc::MAP_PRIVATE)))?),
            ("grow", {
                same(errno(kept.remap(
                    4096,
                    libc::MREMAP_MAYMOVE,
                    ptr::null_mut(),
                )))?
            }),
            ("second", {
                same(errno(none.remap(
                    4096,
                    libc::MREMAP_MAYMOVE,
                    ptr::null_mut(),
                )))?
            }),
            ("over itself, longer", {
                let flags = shared | libc::MAP_FIXED;
                same(errno(Map::new(
                    over.addr,
                    over.pages,
                    RW,
                    flags,
                    fd.as_raw_fd(),
                    0,
                )))?
            }),
        ];
        // What is given up can be had again.
        kept.part(32, 32).unmap()?;
        expect_pages(fd, ours, 32, "half unmapped")?;
        answers.push(("small", errno(map(fd, 128, 0, shared))));
        set_limit(libc::RLIMIT_AS, libc::RLIM_INFINITY)?;
        answers.push(("no limit", errno(map(fd, 4096, 0, shared))));
        kept.part(0, 32).check(TAG)?;
        Ok(answers)
    })
}

/// No VMA left (vm.max_map_count). What would need one more fails with ENOMEM and changes nothing;
/// what needs none works.
pub fn mappings_of_a_process() -> Result<()> {
    const LIMIT: usize = 300;
    let _limit = Setting::set("/proc/sys/vm/max_map_count", LIMIT)?;
    let expected = [
        ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, ENOMEM, 0, 0, 0, 0,
    ];
    as_a_memfd(4096, &expected, |fd, ours| {
        let place = Map::reserve(1024)?;
        let block = place.part(0, 64).cover(fd, 0)?;
        block.fill(TAG);
        // Single pages that cannot merge, until no more can be had.
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
        let same = |answer: c_int| -> Result<c_int> {
            expect_pages(fd, ours, 64 + singles.len(), "at the limit")?;
            block.check(TAG)?;
            for (number, map) in singles.iter().enumerate() {
                ensure!(map.read(0) == TAG + number as u64, "single {number}");
            }
            Ok(answer)
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
        let mut answers = vec![
            ("mmap", same(full)?),
            ("munmap", same(unmap(middle))?),
            ("mprotect", same(errno(middle.protect(libc::PROT_READ)))?),
            ("mmap over", {
                same(over(middle, fd.as_raw_fd(), libc::MAP_SHARED))?
            }),
            ("anonymous over", same(over(middle, -1, anonymous))?),
            ("mremap", {
                same(errno(middle.remap(
                    2,
                    libc::MREMAP_MAYMOVE,
                    ptr::null_mut(),
                )))?
            }),
            ("mremap over", {
                same(errno(middle.remap(1, fixed, singles[0].addr)))?
            }),
            ("mlock", {
                // SAFETY: The test's own mapping.
                same(errno(cvt(unsafe { libc::mlock(middle.addr.cast(), PAGE) })))?
            }),
        ];
        // A process that forks at its limit, and ends.
        fork(|_| same(0).map(drop))?.join()?;
        same(0)?;

        answers.push(("munmap of the head", unmap(block.part(0, 1))));
        expect_pages(fd, ours, 63 + singles.len(), "head unmapped")?;
        // mmap(2) goes one beyond the limit, hence two.
        answers.push(("munmap of one", unmap(singles[7])));
        answers.push(("munmap of another", unmap(singles[9])));
        expect_pages(fd, ours, 61 + singles.len(), "two unmapped")?;
        answers.push(("munmap, with one to spare", unmap(middle)));
        expect_pages(fd, ours, 60 + singles.len(), "middle unmapped")?;
        block.part(1, 29).check(TAG + 1)?;
        block.part(31, 33).check(TAG + 31)?;
        place.unmap()?;
        expect_pages(fd, ours, 0, "all unmapped")?;
        Ok(answers)
    })
}

/// munmap(2), with its error.
fn unmap(map: Map) -> c_int {
    // SAFETY: The test mapped it, and does not use it after this.
    errno(cvt(unsafe {
        libc::munmap(map.addr.cast(), map.pages * PAGE)
    }))
}

/// No more memory may be locked (RLIMIT_MEMLOCK).
pub fn locked_memory() -> Result<()> {
    use libc::{EAGAIN, EPERM};
    let before = meminfo("Mlocked")?;
    let expected = [
        0, ENOMEM, ENOMEM, EAGAIN, EAGAIN, ENOMEM, 0, 0, EPERM, EPERM,
    ];
    as_a_memfd(4096, &expected, |fd, ours| {
        set_limit(libc::RLIMIT_MEMLOCK, 16 * PAGE as u64)?;
        become_nobody()?;
        let kept = Map::shared(fd, 64, 0)?;
        kept.fill(TAG);
        let lock = |pages: usize, flags: u32| {
            // SAFETY: The test's own mapping.
            errno(cvt(unsafe {
                libc::mlock2(kept.addr.cast(), pages * PAGE, flags)
            }))
        };
        let locked = libc::MAP_SHARED | libc::MAP_LOCKED;
        let mut answers = vec![
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
        // What is unmapped is locked no more.
        answers.push(("munmap", unmap(kept.part(0, 8))));
        expect_pages(fd, ours, 56, "unmapped")?;
        answers.push(("MAP_LOCKED of 16", errno(map(fd, 16, 100, locked))));
        expect_pages(fd, ours, 72, "locked, so brought in")?;
        set_limit(libc::RLIMIT_MEMLOCK, 0)?;
        answers.push(("mlock, none allowed", lock(8, 0)));
        answers.push(("MAP_LOCKED, none allowed", errno(map(fd, 1, 0, locked))));
        kept.part(8, 56).check(TAG + 8)?;
        Ok(answers)
    })?;
    soon(|| {
        // Each processor keeps a few pages for later, and this empties all of them.
        fs::write("/proc/sys/vm/drop_caches", "1")?;
        let after = meminfo("Mlocked")?;
        ensure!(after <= before + 8, "Mlocked: {before} -> {after} pages");
        Ok(())
    })
}

/// Files may not be larger than this (RLIMIT_FSIZE): EFBIG and SIGXFSZ for a file of the ioctl, as
/// for a memfd. The device's memory is no file that one writes.
pub fn size_of_files() -> Result<()> {
    let machine = Machine::now()?;
    let steps = |fd: &OwnedFd| -> Result<Answers> {
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
            // SAFETY: The set and the time are ours to read. Takes a signal, if there is one.
            unsafe { libc::sigtimedwait(&signals, ptr::null_mut(), &now) }
        };
        let kept = Map::shared(fd, 4, 0)?;
        kept.fill(TAG);
        let write = |page: usize| {
            let bytes = [7u8; 2 * PAGE];
            // SAFETY: The bytes are ours to read.
            let ret = unsafe {
                let at = (page * PAGE) as i64;
                libc::pwrite(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), at)
            };
            // The bytes written, or the error.
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
        let answers = vec![
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
        Ok(answers)
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
            let answers = steps(&fd)?;
            let found: Vec<_> = answers.iter().map(|(_, answer)| *answer).collect();
            ensure!(found == expected, "ours {ours}: {answers:?}");
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
    machine.expect_back(0)
}

const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";

/// What may be mapped that there is no memory for: as much of it, shared, as one likes, as it is
/// with a memfd, whose pages count when they are touched; not so /dev/zero's, which count at once.
/// Private and writable memory counts at once, whatever file it is of.
pub fn overcommit_of_mappings() -> Result<()> {
    const TERABYTE: usize = (1 << 40) / PAGE;
    let answers = |fd: &OwnedFd| {
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
            let found = answers(&fd);
            ensure!(
                found == expected,
                "mode {mode}, file {number}: {found:?}, not {expected:?}"
            );
        }
    }
    Ok(())
}

/// Pages count when they are touched. When no more may be had, a touch is SIGBUS (EFAULT, asked
/// for by madvise), as with a memfd; and what is unmapped counts no more.
pub fn overcommit_of_pages() -> Result<()> {
    // What each CPU may have counted for itself alone makes as much as this, in all.
    let slack = meminfo("MemTotal")? / 256 + 256;
    let room = 4 * slack;
    let reserve = fs::read_to_string("/proc/sys/vm/admin_reserve_kbytes")?;
    let reserve = reserve.trim().parse::<usize>()? * 1024 / PAGE;
    let _large_processes_may = Setting::set("/proc/sys/vm/user_reserve_kbytes", 0)?;
    // Shared memory, never touched, that counts at once. It takes all, but for room for this
    // test, and a reserve that only root gets: the rest of this machine needs it meanwhile.
    let _always = Setting::set(OVERCOMMIT, 1)?;
    let left = meminfo("CommitLimit")?.saturating_sub(meminfo("Committed_AS")?);
    let ballast = shared_words(left.checked_sub(room + reserve).context("no room")?)?;
    let committed = meminfo("Committed_AS")?;
    let never = Setting::set(OVERCOMMIT, 2)?;

    let many = 2 * room;
    as_a_memfd(many, &[libc::EFAULT, 0], |fd, ours| {
        become_nobody()?;
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
        let answer = errno(again.advise(libc::MADV_POPULATE_WRITE));
        Ok(vec![("touch", full), ("touch again", answer)])
    })?;
    drop(never);
    soon(|| {
        let after = meminfo("Committed_AS")?;
        ensure!(
            after < committed + slack / 4,
            "Committed_AS: {committed} -> {after} pages"
        );
        Ok(())
    })?;
    ballast.unmap()
}
