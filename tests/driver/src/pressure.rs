// SPDX-License-Identifier: GPL-2.0

//! Memory that is short: cgroups, swap, huge pages, NUMA, processors that come and go.
//!
//! Processes that act as guests go on meanwhile. What they wrote has to stay as long as they have it
//! mapped, and when they are gone, so must be every page.

use crate::rules::page_out;
use crate::sys::*;
use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use libc::{c_int, c_long, c_ulong};
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use std::{fs, ptr, thread};

/// The longest anything may take: nothing here does, but on a kernel that hangs.
const WAIT: Duration = Duration::from_secs(300);
/// How long guests are let go on, where one cannot count what is done to them.
const TIME: Duration = Duration::from_secs(3);

const HUGE: usize = 512;
const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// Waits until `done`.
fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        ensure!(start.elapsed() < WAIT, "{what}: not in {WAIT:?}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The status of a child, if it has ended. It has not while a thread of it is left.
fn ended(pid: c_int) -> Result<Option<c_int>> {
    let mut status = 0;
    // SAFETY: The status is ours to write.
    let found =
        cvt(unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) }).context("waitpid")?;
    Ok((found == pid).then_some(status))
}

/// Waits for the end of a child. Of one that hangs, it is said where.
fn end_of(pid: c_int) -> Result<c_int> {
    let mut status = None;
    until("the end of a process", || {
        status = ended(pid)?;
        Ok(status.is_some())
    })
    .with_context(|| stacks(pid))?;
    status.context("no status")
}

/// Where the threads of a process are.
fn stacks(pid: c_int) -> String {
    let mut all = format!("process {pid}:\n");
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        for file in ["stat", "stack"] {
            all += &fs::read_to_string(task.path().join(file)).unwrap_or_default();
        }
    }
    all
}

fn killed(status: c_int) -> bool {
    libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL
}

/// A line of `/proc/vmstat`.
fn vmstat(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/vmstat")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line
        .with_context(|| format!("vmstat has no {name}"))?
        .parse()?)
}

/// Processes that do the same again and again until told to stop. Killed when dropped.
struct Crowd {
    /// Seen by all: how many rounds each of them did, and after that a word that says stop.
    board: Map,
    pids: Vec<c_int>,
}

impl Crowd {
    fn start(
        workers: usize,
        seed: u64,
        round: impl Fn(usize, &mut Rng) -> Result<()>,
    ) -> Result<Self> {
        let mut crowd = Self {
            board: Map::shared(&memfd(1)?, 1, 0)?,
            pids: Vec::new(),
        };
        for worker in 0..workers {
            let child = fork(|_| {
                let mut rng = Rng::with_seed(seed.wrapping_add(worker as u64));
                while crowd.word(workers).load(SeqCst) == 0 {
                    round(worker, &mut rng)?;
                    crowd.word(worker).fetch_add(1, SeqCst);
                }
                Ok(())
            })?;
            crowd.pids.push(child.pid);
        }
        Ok(crowd)
    }

    fn word(&self, word: usize) -> &AtomicU64 {
        // SAFETY: Inside the mapping, which is never unmapped, aligned, and only used like this.
        unsafe { AtomicU64::from_ptr(self.board.word(0, word)) }
    }

    fn rounds(&self) -> Vec<u64> {
        let rounds = (0..self.pids.len()).map(|worker| self.word(worker).load(SeqCst));
        rounds.collect()
    }

    /// Fails if one of them has ended.
    fn alive(&self) -> Result<()> {
        for pid in &self.pids {
            if let Some(status) = ended(*pid)? {
                bail!("a process ended early: status {status:#x}");
            }
        }
        Ok(())
    }

    /// Waits until each of them has done two more rounds: one of them began after this did.
    fn goes_on(&self) -> Result<()> {
        let before = self.rounds();
        until("two rounds more of each", || {
            self.alive()?;
            let rounds = self.rounds();
            Ok(rounds
                .iter()
                .zip(&before)
                .all(|(now, then)| *now >= then + 2))
        })
        .with_context(|| self.pids.iter().map(|pid| stacks(*pid)).collect::<String>())
    }

    /// Tells them to stop, and waits until all are gone.
    fn finish(mut self) -> Result<()> {
        let rounds = self.rounds();
        self.word(self.pids.len()).store(1, SeqCst);
        println!("rounds: {rounds:?}");
        while let Some(pid) = self.pids.pop() {
            let status = end_of(pid)?;
            ensure!(status == 0, "a process ended with status {status:#x}");
        }
        count("operations", rounds.iter().sum());
        Ok(())
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for pid in &self.pids {
            // SAFETY: Our own child, not waited for yet.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
            let _ = end_of(*pid);
        }
    }
}

/// Address space for `pages` pages, with huge pages' alignment, in a reservation.
fn aligned(pages: usize) -> Result<(Map, Map)> {
    let place = Map::reserve(pages + HUGE)?;
    let skip = place.addr.align_offset(HUGE * PAGE) / PAGE;
    Ok((place, place.part(skip, pages)))
}

/// A round in the life of a guest. Nobody else uses its pages.
fn live(
    fd: &OwnedFd,
    first: usize,
    pages: usize,
    rng: &mut Rng,
    meanwhile: impl FnOnce(Map) -> Result<()>,
) -> Result<()> {
    let (place, map) = aligned(pages)?;
    let map = map.cover(fd, first)?;
    let tag = rng.u64(1..1 << 48);
    map.fill(tag);
    meanwhile(map)?;

    // Gives up some at an odd place, and wants them back.
    let at = rng.usize(..pages);
    let len = rng.usize(1..=pages - at);
    let hole = map.part(at, len);
    hole.unmap()?;
    map.part(0, at).check(tag)?;
    map.part(at + len, pages - at - len)
        .check(tag + (at + len) as u64)?;
    hole.cover(fd, first + at)?.check_zero()?;
    hole.fill(tag + at as u64);
    map.check(tag)?;
    place.unmap()
}

/// Fails unless all pages of `fd` are back. Compaction and khugepaged may have some for a moment.
fn all_back(fd: &OwnedFd) -> Result<()> {
    let gone = || Ok(info(fd)?.resident + info(fd)?.swapped == 0);
    until("pages back", gone).with_context(|| format!("{:?}", info(fd)))
}

/// Fails unless Shmem is `before` again, or less.
fn shmem_is_back(before: usize) -> Result<()> {
    let gone = || Ok(meminfo("Shmem")? < before + 64);
    until("Shmem back", gone).with_context(|| format!("Shmem was {before} pages"))
}

fn both_doors(pages: usize) -> Result<[OwnedFd; 2]> {
    Ok([device()?, ioctl_file(pages)?])
}

/// Pages that a cgroup may have.
const LIMIT: usize = 1024;

/// A cgroup limited to [`LIMIT`] pages, and `swap` in swap.
fn limited(name: &str, swap: usize) -> Result<Cgroup> {
    let group = Cgroup::new(name)?;
    group.set("memory.max", LIMIT * PAGE)?;
    group.set("memory.swap.max", swap * PAGE)?;
    Ok(group)
}

/// Fails unless all that was charged to the group is given back, but what the kernel keeps.
fn uncharged(group: &Cgroup) -> Result<()> {
    let gone = || {
        Ok(group.charged("memory.current")? < LIMIT / 4
            && group.charged("memory.swap.current")? == 0)
    };
    until("the group's charge gone", gone)
}

/// Of guests with a cgroup each, one wants more than it may have. It alone is killed.
pub fn only_the_offender_is_killed(seed: u64) -> Result<()> {
    const OTHERS: usize = 3;
    for swap in [0, LIMIT / 4] {
        let shmem = meminfo("Shmem")?;
        let group = limited("offender", swap)?;
        let groups = (0..OTHERS)
            .map(|guest| limited(&format!("guest{guest}"), swap))
            .collect::<Result<Vec<_>>>()?;
        let fds = both_doors(4 * LIMIT)?;
        let others = Crowd::start(OTHERS, seed, |guest, rng| {
            groups[guest].join()?;
            live(&device()?, 0, LIMIT / 4, rng, |_| Ok(()))
        })?;
        others.goes_on()?;

        // The descriptors stay with us, so that its pages go by the end of its mappings alone.
        let offender = fork(|_| {
            group.join()?;
            for fd in &fds {
                let map = Map::shared(fd, 4 * LIMIT, 0)?;
                map.part(0, LIMIT / 4).fill(1);
            }
            Map::shared(&fds[0], 4 * LIMIT, 0)?.fill(1);
            Ok(())
        })?;
        let status = end_of(offender.pid)?;
        ensure!(killed(status), "the offender: status {status:#x}");
        ensure!(group.events("oom_kill")? == 1, "not killed by its cgroup");
        fds.iter().try_for_each(all_back)?;
        uncharged(&group)?;

        others.goes_on()?;
        others.finish()?;
        for other in &groups {
            ensure!(other.events("oom_kill")? == 0, "another was killed");
            uncharged(other)?;
        }
        shmem_is_back(shmem)?;
    }
    Ok(())
}

/// Processes of a cgroup, two threads each, are at its limit in faults of one object, while others
/// unmap pages of it, are killed for want of memory, and end. Closing a mapping waits for faults,
/// and those for memory that a mapping's end will free: all of that has to come to an end.
pub fn killed_while_others_unmap(seed: u64) -> Result<()> {
    const WORKERS: usize = 3;
    const REGION: usize = LIMIT * 3 / 4;
    const KILLS: usize = 3;
    let run = |fd: &OwnedFd, swap, all_at_once| -> Result<()> {
        let group = limited("full", swap)?;
        group.set("memory.oom.group", all_at_once)?;
        let worker = |worker: usize| {
            fork(|_| {
                group.join()?;
                thread::scope(|scope| {
                    scope.spawn(|| {
                        let mut rng = Rng::new();
                        loop {
                            let map = Map::shared(fd, 4, rng.usize(..WORKERS * REGION - 4));
                            let map = map.expect("mmap");
                            // SAFETY: Inside the mapping, and nobody's word.
                            (0..4).for_each(|page| unsafe {
                                map.word(page, 1 + worker).write_volatile(1);
                            });
                            map.unmap().expect("munmap");
                        }
                    });
                    loop {
                        let map = Map::shared(fd, REGION, worker * REGION)?;
                        map.fill(2);
                        map.check(2)?;
                        map.part(0, REGION / 2).unmap()?;
                        map.part(REGION / 2, REGION / 2)
                            .check(2 + REGION as u64 / 2)?;
                        map.part(REGION / 2, REGION / 2).unmap()?;
                    }
                })
            })
        };

        // Not of the group: pages of its own, and now and then a mapping of all that keeps the
        // group at its limit, whoever is killed.
        let outsider = Crowd::start(1, seed, |_, rng| {
            let all = Map::shared(fd, WORKERS * REGION, 0)?;
            for _ in 0..rng.u8(1..4) {
                live(fd, WORKERS * REGION, 64, rng, |_| Ok(()))?;
                all.read(rng.usize(..WORKERS * REGION));
            }
            all.unmap()?;
            live(fd, WORKERS * REGION, 64, rng, |_| Ok(()))
        })?;
        outsider.goes_on()?;
        let mut workers = (0..WORKERS).map(worker).collect::<Result<Vec<_>>>()?;
        let mut kills = 0;
        until("enough of them killed", || {
            for (number, peer) in workers.iter_mut().enumerate() {
                if let Some(status) = ended(peer.pid)? {
                    ensure!(killed(status), "a worker ended: status {status:#x}");
                    kills += 1;
                    *peer = worker(number)?;
                }
            }
            Ok(kills >= KILLS)
        })?;
        outsider.goes_on()?;
        for peer in &workers {
            // SAFETY: Our own child.
            unsafe { libc::kill(peer.pid, libc::SIGKILL) };
        }
        for peer in &workers {
            end_of(peer.pid)?;
        }
        ensure!(
            group.events("oom_kill")? >= KILLS,
            "killed by somebody else"
        );
        outsider.goes_on()?;
        outsider.finish()?;
        all_back(fd)?;
        uncharged(&group)
    };

    let shmem = meminfo("Shmem")?;
    for swap in [0, LIMIT / 4] {
        for (fd, all_at_once) in both_doors(4 * LIMIT)?.iter().zip([0, 1]) {
            run(fd, swap, all_at_once)
                .with_context(|| format!("{swap} pages of swap, memory.oom.group {all_at_once}"))?;
        }
    }
    shmem_is_back(shmem)
}

/// A process that may not be killed faults at its limit, and will until there is memory. Whoever
/// unmaps other pages of the same object goes on, and that is what ends it.
pub fn unkillable_at_its_limit() -> Result<()> {
    for fd in both_doors(4 * LIMIT)? {
        let group = limited("unkillable", 0)?;
        let mut child = fork(|peer| {
            group.join()?;
            fs::write("/proc/self/oom_score_adj", "-1000")?;
            let first = Map::shared(&fd, LIMIT / 2, 0)?;
            first.fill(1);
            peer.meet()?;
            peer.meet()?;
            first.unmap()?;
            let second = Map::shared(&fd, LIMIT * 3 / 4, LIMIT)?;
            second.fill(2);
            second.check(2)
        })?;
        child.meet()?;
        let ours = Map::shared(&fd, LIMIT / 2, 0)?;
        child.meet()?;
        until("at its limit", || Ok(group.events("oom")? > 0))?;
        ours.check(1)?;
        ensure!(ended(child.pid)?.is_none(), "it ended at its limit");
        ours.unmap()?;
        let status = end_of(child.pid)?;
        ensure!(status == 0, "status {status:#x}");
        all_back(&fd)?;
        uncharged(&group)?;
    }
    Ok(())
}

/// `SWAP_FLAG_PREFER` of `linux/swap.h`: a priority follows.
const SWAP_FLAG_PREFER: c_int = 0x8000;

/// Swap on compressed memory, used before all other, given up when dropped.
struct Zram(String);

impl Zram {
    fn new(pages: usize) -> Result<Self> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").context("zram")?;
        let zram = Self(number.trim().to_owned());
        fs::write(zram.sys("disksize"), (pages * PAGE).to_string()).context("disksize")?;
        crate::busybox(&["mkswap", &zram.dev()])?;
        let dev = CString::new(zram.dev())?;
        // SAFETY: A string.
        cvt(unsafe { libc::swapon(dev.as_ptr(), SWAP_FLAG_PREFER | 100) }).context("swapon")?;
        Ok(zram)
    }

    fn dev(&self) -> String {
        format!("/dev/zram{}", self.0)
    }

    fn sys(&self, file: &str) -> String {
        format!("/sys/block/zram{}/{file}", self.0)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = crate::busybox(&["swapoff", &self.dev()]);
        let _ = fs::write(self.sys("reset"), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", &self.0);
    }
}

fn swap_used() -> Result<usize> {
    Ok(meminfo("SwapTotal")? - meminfo("SwapFree")?)
}

/// What word `word` of page `page` holds. Most pages are one word repeated, of which zram keeps that
/// word; the others it has to compress.
fn content(page: usize, word: usize) -> u64 {
    let value = 0xa110_c8ed_0000_0000 + page as u64;
    if page % 16 == 0 && word < 16 {
        value << word
    } else {
        value
    }
}

/// Does something with each page. Most of them are taken out of the page tables after that, and stay
/// in the file: to do so when they go to swap costs a flush of the TLB each, which is dear in emulation.
fn page_by_page(map: Map, mut each: impl FnMut(usize) -> Result<()>) -> Result<()> {
    const CHUNK: usize = 1024;
    for (number, first) in (0..map.pages).step_by(CHUNK).enumerate() {
        let part = map.part(first, CHUNK.min(map.pages - first));
        (first..first + part.pages).try_for_each(&mut each)?;
        if number % 8 != 0 {
            part.advise(libc::MADV_DONTNEED).context("MADV_DONTNEED")?;
        }
    }
    Ok(())
}

/// Four times the machine's memory, half of it by each door, is written, read and unmapped.
pub fn four_times_the_memory() -> Result<()> {
    const SMALL: usize = (1 << 30) / PAGE;
    let memory = meminfo("MemTotal")?;
    if memory > SMALL {
        return skip("wants a machine with 1 GiB of memory at most, and all of that");
    }
    let (swaps, used) = (
        fs::read_to_string("/proc/swaps")?.lines().count(),
        swap_used()?,
    );
    let zram = Zram::new(4 * memory + SMALL / 16)?;
    // In a process of its own, which may be killed, and has left the swap when that is taken away.
    let child = fork(|_| {
        let before = meminfo("Shmem")? + swap_used()?;
        let maps = both_doors(2 * memory)?;
        let maps = maps.map(|fd| Map::shared(&fd, 2 * memory, 0).map(|map| (fd, map)));
        let maps = maps.into_iter().collect::<Result<Vec<_>>>()?;
        let out = vmstat("pswpout")?;
        for (_, map) in &maps {
            page_by_page(*map, |page| {
                // SAFETY: Inside the mapping, and aligned.
                (0..PAGE / 8).for_each(|word| unsafe {
                    map.word(page, word).write(content(page, word));
                });
                Ok(())
            })?;
        }
        for (fd, map) in &maps {
            // One that is just being moved counts twice.
            until("all written pages there", || {
                let all = info(fd)?;
                Ok(all.resident + all.swapped == map.pages)
            })?;
            page_by_page(*map, |page| {
                // SAFETY: As above.
                let wrong = (0..PAGE / 8)
                    .find(|word| unsafe { map.word(page, *word).read() } != content(page, *word));
                ensure!(wrong.is_none(), "page {page}, word {wrong:?}");
                Ok(())
            })?;
        }
        let out = vmstat("pswpout")? - out;
        println!("{} pages, {out} swapped out", 4 * memory);
        ensure!(out as usize > 3 * memory, "{out} pages swapped out");
        for (fd, map) in &maps {
            map.unmap()?;
            all_back(fd)?;
            ensure!(info(fd)?.freed >= map.pages as u64, "{:?}", info(fd)?);
        }
        // Other processes' memory went out as well. There is little of that.
        let left = (meminfo("Shmem")? + swap_used()?).saturating_sub(before);
        ensure!(left < 2048, "Shmem and swap: {left} pages more than before");
        count("pages", 4 * memory as u64);
        Ok(())
    })?;
    let status = wait(child.pid)?;
    ensure!(status == 0, "status {status:#x}");

    drop(zram);
    let now = fs::read_to_string("/proc/swaps")?.lines().count();
    ensure!(now == swaps, "swap was not given up");
    ensure!(
        swap_used()? <= used,
        "{} pages in swap, and {used} before",
        swap_used()?
    );
    Ok(())
}

/// Where the kernel keeps the knobs of each size of huge pages, and the size in pages.
fn huge_sizes() -> Result<Vec<(PathBuf, usize)>> {
    let mut sizes = Vec::new();
    for entry in fs::read_dir(THP).context(THP)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let size = name.and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB"));
        if let Some(size) = size.filter(|_| path.join("shmem_enabled").exists()) {
            sizes.push((path.clone(), size.parse::<usize>()? * 1024 / PAGE));
        }
    }
    sizes.sort_by_key(|(_, pages)| *pages);
    Ok(sizes)
}

/// Four pages of `size` pages each lose some of these at odd places.
fn cut(fd: &OwnedFd, size: usize, hint: bool) -> Result<()> {
    let (place, all) = aligned(4 * size)?;
    for number in 0..4 {
        // As large as what is mapped allows, so map no more than that.
        let map = all.part(number * size, size).cover(fd, number * size)?;
        if hint {
            map.advise(libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
        }
        map.fill(1 + (number * size) as u64);
    }
    expect_resident(fd, 4 * size, "touched")?;

    // Across two, one whole, in the middle of one, and (of some size) inside one.
    let mut holes = vec![
        (size - 1, 2),
        (2 * size, size),
        (3 * size + size / 2, (size / 4).max(1)),
    ];
    if size >= 8 {
        holes.push((1, 3));
    }
    let mut live = vec![true; 4 * size];
    for (first, pages) in &holes {
        all.part(*first, *pages).unmap()?;
        live[*first..*first + *pages].fill(false);
        let left = live.iter().filter(|live| **live).count();
        expect_resident(fd, left, &format!("{pages} from {first} on unmapped"))?;
    }
    for (page, live) in live.iter().enumerate().filter(|(_, live)| **live) {
        ensure!(
            *live && all.read(page) == 1 + page as u64,
            "page {page} lost"
        );
    }
    for (first, pages) in &holes {
        all.part(*first, *pages).cover(fd, *first)?.check_zero()?;
    }
    place.unmap()?;
    expect_resident(fd, 0, "all unmapped")
}

/// Huge pages of every size the kernel has, whatever its knobs say.
pub fn huge_pages_of_each_size() -> Result<()> {
    let sizes = huge_sizes()?;
    if sizes.is_empty() {
        return skip("no huge pages of several sizes");
    }
    let shmem = meminfo("Shmem")?;
    for (mode, hint) in [("advise", true), ("always", false)] {
        let _mode = Setting::set(Path::new(THP).join("shmem_enabled"), mode)?;
        for knob in ["inherit", "always"] {
            let _knobs = sizes
                .iter()
                .map(|(path, _)| Setting::set(path.join("shmem_enabled"), knob))
                .collect::<Result<Vec<_>>>()?;
            for (path, size) in &sizes {
                let stat = path.join("stats/shmem_alloc");
                let made = || -> Result<u64> { Ok(fs::read_to_string(&stat)?.trim().parse()?) };
                let before = made()?;
                for fd in both_doors(4 * size)? {
                    cut(&fd, *size, hint)
                        .with_context(|| format!("{mode}, each size {knob}, {size} pages"))?;
                }
                ensure!(
                    made()? >= before + 8,
                    "{mode}, {knob}: not made of {size} pages"
                );
            }
        }
    }
    shmem_is_back(shmem)
}

/// Huge pages that are whole in swap are freed there, and none is read back to free a part of it.
pub fn huge_pages_go_from_swap() -> Result<()> {
    const PAGES: usize = 16 * HUGE;
    let _huge = Setting::set(Path::new(THP).join("shmem_enabled"), "always")?;
    for fd in both_doors(PAGES)? {
        let (place, map) = aligned(PAGES)?;
        let map = map.cover(&fd, 0)?;
        map.fill(1);
        let whole = vmstat("thp_swpout")?;
        page_out(&fd, map)?;
        let whole = vmstat("thp_swpout")? - whole;
        ensure!(whole > 8, "{whole} huge pages went to swap as they are");

        let read = vmstat("pswpin")?;
        map.unmap()?;
        let read = vmstat("pswpin")? - read;
        ensure!(read == 0, "{read} pages were read from swap to be freed");
        all_back(&fd)?;
        place.unmap()?;
    }
    Ok(())
}

/// Moves the machine's memory together, again and again.
fn compaction() -> Result<Crowd> {
    Crowd::start(1, 0, |_, _| {
        // khugepaged is nice, and would not get far otherwise.
        thread::sleep(Duration::from_millis(20));
        fs::write("/proc/sys/vm/compact_memory", "1").context("compact_memory")
    })
}

/// khugepaged makes huge pages of what guests have mapped and give up, compaction moves both.
pub fn khugepaged_and_compaction(seed: u64) -> Result<()> {
    let settings = [
        ("shmem_enabled", "advise"),
        ("enabled", "always"),
        ("khugepaged/defrag", "1"),
        ("khugepaged/max_ptes_none", "511"),
        ("khugepaged/pages_to_scan", "100000"),
        ("khugepaged/alloc_sleep_millisecs", "0"),
        ("khugepaged/scan_sleep_millisecs", "0"),
    ];
    let _settings = settings
        .iter()
        .map(|(file, value)| Setting::set(Path::new(THP).join(file), value))
        .collect::<Result<Vec<_>>>()?;
    let shmem = meminfo("Shmem")?;
    let [dev, file] = both_doors(HUGE)?;
    let compaction = compaction()?;
    let guests = Crowd::start(2, seed, |guest, rng| {
        let pause = Duration::from_millis(rng.u64(..300));
        live([&dev, &file][guest], 0, HUGE, rng, |map| {
            // From here on they may be huge; small they are already.
            map.advise(libc::MADV_HUGEPAGE)?;
            thread::sleep(pause);
            Ok(())
        })
    })?;
    // The huge pages that are seen are of its making.
    let (start, mut seen) = (Instant::now(), 0);
    until("khugepaged at work", || {
        guests.alive()?;
        seen += usize::from(meminfo("ShmemHugePages")? > 0);
        Ok(start.elapsed() > TIME && seen >= 10)
    })?;
    guests.goes_on()?;
    compaction.goes_on()?;
    println!("huge pages seen {seen} times");
    guests.finish()?;
    compaction.finish()?;
    all_back(&dev).context("device")?;
    // What is emptied of a huge page that somebody holds stays in a file of the ioctl, until it goes.
    println!("of the ioctl's file: {:?}", info(&file)?);
    drop(file);
    shmem_is_back(shmem)
}

/// The nodes that have memory.
fn nodes() -> Result<Vec<usize>> {
    let text = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    let mut nodes = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        nodes.extend(first.parse::<usize>()?..=last.parse()?);
    }
    Ok(nodes)
}

fn numa(what: &str, ret: c_long) -> Result<c_int> {
    match cvt(ret as c_int) {
        Err(err) if err.raw_os_error() == Some(libc::ENOSYS) => {
            skip("the kernel moves no pages between nodes")
        }
        result => result.with_context(|| what.to_owned()),
    }
}

/// `MPOL_MF_MOVE` of `linux/mempolicy.h`.
const MPOL_MF_MOVE: c_int = 2;

/// Moves the pages of `map` to `node`, if one is given. Returns where each page is then.
fn move_pages(map: Map, node: Option<usize>) -> Result<Vec<c_int>> {
    let pages: Vec<_> = (0..map.pages).map(|page| map.word(page, 0)).collect();
    let to = node.map(|node| vec![node as c_int; map.pages]);
    let mut status = vec![-1; map.pages];
    let to = to.as_ref().map_or(ptr::null(), |to| to.as_ptr());
    // SAFETY: Three arrays of that length, of which the second may be missing.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            map.pages,
            pages.as_ptr(),
            to,
            status.as_mut_ptr(),
            MPOL_MF_MOVE,
        )
    };
    numa("move_pages", ret)?;
    Ok(status)
}

/// Moves what process `pid` (0: this one) has on node `from` to node `to`.
fn migrate_pages(pid: c_int, from: usize, to: usize) -> Result<c_int> {
    let (from, to): (c_ulong, c_ulong) = (1 << from, 1 << to);
    // SAFETY: Two bit masks of one word; the kernel takes one bit off the number of bits.
    numa("migrate_pages", unsafe {
        libc::syscall(
            libc::SYS_migrate_pages,
            pid,
            65,
            &raw const from,
            &raw const to,
        )
    })
}

fn mbind(map: Map, node: usize) -> Result<()> {
    let mask: c_ulong = 1 << node;
    // SAFETY: A mapping of ours and a bit mask of one word.
    numa("mbind", unsafe {
        libc::syscall(
            libc::SYS_mbind,
            map.addr,
            map.pages * PAGE,
            libc::MPOL_BIND,
            &raw const mask,
            65,
            MPOL_MF_MOVE,
        )
    })?;
    Ok(())
}

/// Pages move between nodes by each of the three calls, and are the same pages after that.
pub fn pages_move_between_nodes(seed: u64) -> Result<()> {
    let nodes = nodes()?;
    let [one, two, ..] = nodes[..] else {
        return skip("one NUMA node only; numa=fake=2 makes two");
    };
    // The kernel is not to move them itself.
    let balancing = Path::new("/proc/sys/kernel/numa_balancing");
    let _balancing = balancing
        .exists()
        .then(|| Setting::set(balancing, "0"))
        .transpose()?;
    let shmem = meminfo("Shmem")?;

    for mode in ["never", "always"] {
        let _mode = Setting::set(Path::new(THP).join("shmem_enabled"), mode)?;
        for fd in both_doors(2 * HUGE)? {
            let (place, map) = aligned(2 * HUGE)?;
            let map = map.cover(&fd, 0)?;
            map.fill(1);
            // A page that somebody holds just then stays where it is: so ask until all went.
            let moved = |how: &str, node: usize, call: &dyn Fn() -> Result<()>| -> Result<()> {
                let all = || Ok(move_pages(map, None)?.iter().all(|at| *at == node as c_int));
                until(how, || call().and_then(|()| all()))?;
                expect_resident(&fd, 2 * HUGE, how)?;
                map.check(1).with_context(|| how.to_owned())
            };
            for (from, to) in [(one, two), (two, one)] {
                moved("move_pages", to, &|| move_pages(map, Some(to)).map(drop))?;
                moved("migrate_pages", from, &|| {
                    migrate_pages(0, to, from).map(drop)
                })?;
                moved("mbind", to, &|| mbind(map, to))?;
            }
            // The policy is the object's: it holds for what is touched later, by whomever.
            map.part(0, HUGE).unmap()?;
            expect_resident(&fd, HUGE, "half unmapped")?;
            map.part(0, HUGE).cover(&fd, 0)?.fill(1);
            let found = move_pages(map, None)?;
            ensure!(
                found.iter().all(|at| *at == one as c_int),
                "policy lost: {found:?}"
            );
            map.check(1)?;
            place.unmap()?;
            expect_resident(&fd, 0, "all unmapped")?;
        }
    }

    // And while they are touched and unmapped.
    let fds = both_doors(4 * HUGE)?;
    let guests = Crowd::start(4, seed, |guest, rng| {
        live(&fds[guest % 2], guest / 2 * HUGE, HUGE / 4, rng, |_| Ok(()))
    })?;
    let start = Instant::now();
    let moved = vmstat("pgmigrate_success")?;
    until("pages moved", || {
        guests.alive()?;
        for pid in &guests.pids {
            migrate_pages(*pid, one, two)?;
            migrate_pages(*pid, two, one)?;
        }
        Ok(start.elapsed() > TIME && vmstat("pgmigrate_success")? > moved + 1000)
    })?;
    println!(
        "{} pages moved meanwhile",
        vmstat("pgmigrate_success")? - moved
    );
    guests.goes_on()?;
    guests.finish()?;
    fds.iter().try_for_each(all_back)?;
    shmem_is_back(shmem)
}

/// A processor goes and comes, and memory is moved, while guests map, touch and unmap.
pub fn processors_come_and_go(seed: u64) -> Result<()> {
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";
    if !fs::exists(ONLINE)? {
        return skip("one processor, or none that can be taken away");
    }
    let online = Setting::set(ONLINE, "1")?;
    let shmem = meminfo("Shmem")?;
    let fds = both_doors(4 * HUGE)?;
    let compaction = compaction()?;
    let guests = Crowd::start(4, seed, |guest, rng| {
        live(&fds[guest % 2], guest / 2 * HUGE, HUGE / 4, rng, |_| Ok(()))
    })?;
    let (start, mut times) = (Instant::now(), 0);
    while times < 4 || start.elapsed() < TIME {
        fs::write(ONLINE, "0").context("offline")?;
        guests.goes_on()?;
        fs::write(ONLINE, "1").context("online")?;
        guests.goes_on()?;
        times += 1;
    }
    println!("gone {times} times");
    guests.finish()?;
    compaction.goes_on()?;
    compaction.finish()?;
    fds.iter().try_for_each(all_back)?;
    shmem_is_back(shmem)?;
    drop(online);
    ensure!(
        fs::read_to_string(ONLINE)?.trim() == "1",
        "processor 1 is not back"
    );
    Ok(())
}
