// SPDX-License-Identifier: GPL-2.0

//! Memory pressure: cgroups, swap, huge pages, NUMA, CPU hotplug.
//!
//! Meanwhile, worker processes that act as guests keep running. Their data has to stay for as long as
//! they have it mapped, and every page has to be freed once they are gone.

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

/// Upper limit for any wait. Only a kernel that hangs reaches it.
const WAIT: Duration = Duration::from_secs(300);
/// How long guests keep running where the events they undergo cannot be counted.
const TIME: Duration = Duration::from_secs(3);

const HUGE: usize = 512;
const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// Waits until `done` returns true.
fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        ensure!(start.elapsed() < WAIT, "{what}: not within {WAIT:?}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The exit status of a child, or `None` while any thread of it is left.
fn try_wait(pid: c_int) -> Result<Option<c_int>> {
    let mut status = 0;
    // SAFETY: The kernel writes the status.
    let found =
        cvt(unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) }).context("waitpid")?;
    Ok((found == pid).then_some(status))
}

/// Waits for a child to exit. If it hangs, the error contains its stacks.
fn wait_for_exit(pid: c_int) -> Result<c_int> {
    let mut status = None;
    wait_until("exit of a process", || {
        status = try_wait(pid)?;
        Ok(status.is_some())
    })
    .with_context(|| stacks(pid))?;
    status.context("no status")
}

/// The states and kernel stacks of a process's threads.
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

/// A value of `/proc/vmstat`.
fn vmstat(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/vmstat")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line
        .with_context(|| format!("vmstat has no {name}"))?
        .parse()?)
}

/// Processes that repeat a round until told to stop. Killed on drop.
struct Workers {
    /// Shared with all: a round counter for each worker, then the word that tells them to stop.
    board: Map,
    pids: Vec<c_int>,
}

impl Workers {
    fn start(
        number: usize,
        seed: u64,
        round: impl Fn(usize, &mut Rng) -> Result<()>,
    ) -> Result<Self> {
        let mut workers = Self {
            board: Map::shared(&memfd(1)?, 1, 0)?,
            pids: Vec::new(),
        };
        for worker in 0..number {
            let child = fork(|_| {
                let mut rng = Rng::with_seed(seed.wrapping_add(worker as u64));
                while workers.word(number).load(SeqCst) == 0 {
                    round(worker, &mut rng)?;
                    workers.word(worker).fetch_add(1, SeqCst);
                }
                Ok(())
            })?;
            workers.pids.push(child.pid);
        }
        Ok(workers)
    }

    fn word(&self, word: usize) -> &AtomicU64 {
        // SAFETY: Aligned, inside a mapping that is never unmapped, and only accessed atomically.
        unsafe { AtomicU64::from_ptr(self.board.word(0, word)) }
    }

    fn rounds(&self) -> Vec<u64> {
        let rounds = (0..self.pids.len()).map(|worker| self.word(worker).load(SeqCst));
        rounds.collect()
    }

    /// Fails if a worker has exited.
    fn expect_alive(&self) -> Result<()> {
        for pid in &self.pids {
            if let Some(status) = try_wait(*pid)? {
                bail!("a worker exited early: status {status:#x}");
            }
        }
        Ok(())
    }

    /// Waits until each worker has completed two more rounds. The second of them began after this call.
    fn expect_progress(&self) -> Result<()> {
        let before = self.rounds();
        wait_until("two more rounds of each worker", || {
            self.expect_alive()?;
            let rounds = self.rounds();
            Ok(rounds
                .iter()
                .zip(&before)
                .all(|(now, then)| *now >= then + 2))
        })
        .with_context(|| self.pids.iter().map(|pid| stacks(*pid)).collect::<String>())
    }

    /// Tells the workers to stop, and waits until all have exited.
    fn finish(mut self) -> Result<()> {
        let rounds = self.rounds();
        self.word(self.pids.len()).store(1, SeqCst);
        println!("rounds: {rounds:?}");
        while let Some(pid) = self.pids.pop() {
            let status = wait_for_exit(pid)?;
            ensure!(status == 0, "a worker exited with status {status:#x}");
        }
        count("operations", rounds.iter().sum());
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for pid in &self.pids {
            // SAFETY: Our own child, not waited for yet.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
            let _ = wait_for_exit(*pid);
        }
    }
}

/// A reservation, and in it address space for `pages` pages that is aligned for huge pages.
fn aligned(pages: usize) -> Result<(Map, Map)> {
    let place = Map::reserve(pages + HUGE)?;
    let skip = place.addr.align_offset(HUGE * PAGE) / PAGE;
    Ok((place, place.part(skip, pages)))
}

/// One round of a guest, whose pages nobody else uses.
fn guest_round(
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

    // Unmaps some pages at an arbitrary place, and maps them again.
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

/// Fails unless all pages of `fd` are freed. Compaction and khugepaged may hold some for a moment.
fn expect_all_freed(fd: &OwnedFd) -> Result<()> {
    let freed = || Ok(info(fd)?.resident + info(fd)?.swapped == 0);
    wait_until("all pages freed", freed).with_context(|| format!("{:?}", info(fd)))
}

/// Fails unless Shmem drops back to about `before` pages.
fn expect_shmem_back(before: usize) -> Result<()> {
    let back = || Ok(meminfo("Shmem")? < before + 64);
    wait_until("Shmem back", back).with_context(|| format!("Shmem was {before} pages"))
}

fn both_doors(pages: usize) -> Result<[OwnedFd; 2]> {
    Ok([device()?, ioctl_file(pages)?])
}

/// Memory limit of a cgroup, in pages.
const LIMIT: usize = 1024;

/// A cgroup limited to [`LIMIT`] pages of memory and `swap` pages of swap.
fn limited(name: &str, swap: usize) -> Result<Cgroup> {
    let group = Cgroup::new(name)?;
    group.set("memory.max", LIMIT * PAGE)?;
    group.set("memory.swap.max", swap * PAGE)?;
    Ok(group)
}

/// Fails unless everything charged to the group is uncharged, apart from what the kernel keeps.
fn expect_uncharged(group: &Cgroup) -> Result<()> {
    let gone = || {
        Ok(group.charged("memory.current")? < LIMIT / 4
            && group.charged("memory.swap.current")? == 0)
    };
    wait_until("the cgroup's charge gone", gone)
}

/// Each guest has its own cgroup. One exceeds its limit, and is the only one killed.
pub fn only_the_offender_is_killed(seed: u64) -> Result<()> {
    const OTHERS: usize = 3;
    for swap in [0, LIMIT / 4] {
        let shmem = meminfo("Shmem")?;
        let group = limited("offender", swap)?;
        let groups = (0..OTHERS)
            .map(|guest| limited(&format!("guest{guest}"), swap))
            .collect::<Result<Vec<_>>>()?;
        let fds = both_doors(4 * LIMIT)?;
        let others = Workers::start(OTHERS, seed, |guest, rng| {
            groups[guest].join()?;
            guest_round(&device()?, 0, LIMIT / 4, rng, |_| Ok(()))
        })?;
        others.expect_progress()?;

        // This process keeps the descriptors, so only the end of the mappings can free the pages.
        let offender = fork(|_| {
            group.join()?;
            for fd in &fds {
                let map = Map::shared(fd, 4 * LIMIT, 0)?;
                map.part(0, LIMIT / 4).fill(1);
            }
            Map::shared(&fds[0], 4 * LIMIT, 0)?.fill(1);
            Ok(())
        })?;
        let status = wait_for_exit(offender.pid)?;
        ensure!(killed(status), "the offender: status {status:#x}");
        ensure!(
            group.events("oom_kill")? == 1,
            "not killed by its cgroup's OOM"
        );
        fds.iter().try_for_each(expect_all_freed)?;
        expect_uncharged(&group)?;

        others.expect_progress()?;
        others.finish()?;
        for other in &groups {
            ensure!(other.events("oom_kill")? == 0, "another was killed");
            expect_uncharged(other)?;
        }
        expect_shmem_back(shmem)?;
    }
    Ok(())
}

/// Processes of a cgroup, two threads each, fault in pages of one object at the cgroup's limit, while
/// others unmap pages of it, are OOM-killed, and exit. Closing a mapping waits for faults, and faults
/// wait for memory that closing a mapping frees: none of that may deadlock.
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
                            // SAFETY: Inside the mapping, and nobody else's word.
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

        // Not in the cgroup. It uses pages of its own, and now and then maps all pages, which keeps
        // the cgroup at its limit no matter which worker is killed.
        let outsider = Workers::start(1, seed, |_, rng| {
            let all = Map::shared(fd, WORKERS * REGION, 0)?;
            for _ in 0..rng.u8(1..4) {
                guest_round(fd, WORKERS * REGION, 64, rng, |_| Ok(()))?;
                all.read(rng.usize(..WORKERS * REGION));
            }
            all.unmap()?;
            guest_round(fd, WORKERS * REGION, 64, rng, |_| Ok(()))
        })?;
        outsider.expect_progress()?;
        let mut workers = (0..WORKERS).map(worker).collect::<Result<Vec<_>>>()?;
        let mut kills = 0;
        wait_until("enough workers killed", || {
            for (number, peer) in workers.iter_mut().enumerate() {
                if let Some(status) = try_wait(peer.pid)? {
                    ensure!(killed(status), "a worker exited: status {status:#x}");
                    kills += 1;
                    *peer = worker(number)?;
                }
            }
            Ok(kills >= KILLS)
        })?;
        outsider.expect_progress()?;
        for peer in &workers {
            // SAFETY: Our own child.
            unsafe { libc::kill(peer.pid, libc::SIGKILL) };
        }
        for peer in &workers {
            wait_for_exit(peer.pid)?;
        }
        ensure!(
            group.events("oom_kill")? >= KILLS,
            "not all killed by the cgroup's OOM"
        );
        outsider.expect_progress()?;
        outsider.finish()?;
        expect_all_freed(fd)?;
        expect_uncharged(&group)
    };

    let shmem = meminfo("Shmem")?;
    for swap in [0, LIMIT / 4] {
        for (fd, all_at_once) in both_doors(4 * LIMIT)?.iter().zip([0, 1]) {
            run(fd, swap, all_at_once)
                .with_context(|| format!("{swap} pages of swap, memory.oom.group {all_at_once}"))?;
        }
    }
    expect_shmem_back(shmem)
}

/// A process that may not be killed keeps faulting at its limit until there is memory. Another process
/// can still unmap pages of the same object, and that lets the first one continue.
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
        wait_until("at its limit", || Ok(group.events("oom")? > 0))?;
        ours.check(1)?;
        ensure!(try_wait(child.pid)?.is_none(), "it exited at its limit");
        ours.unmap()?;
        let status = wait_for_exit(child.pid)?;
        ensure!(status == 0, "status {status:#x}");
        expect_all_freed(&fd)?;
        expect_uncharged(&group)?;
    }
    Ok(())
}

/// `SWAP_FLAG_PREFER` of `linux/swap.h`: the low bits are a priority.
const SWAP_FLAG_PREFER: c_int = 0x8000;

/// A zram swap device, used before any other swap and removed on drop.
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

/// The content of word `word` of page `page`. Most pages repeat one word, and zram stores just that
/// word; it has to compress the others.
fn content(page: usize, word: usize) -> u64 {
    let value = 0xa110_c8ed_0000_0000 + page as u64;
    if page % 16 == 0 && word < 16 {
        value << word
    } else {
        value
    }
}

/// Calls `each` for each page. Most pages are removed from the page tables afterwards, but stay in the
/// file: otherwise swapping them out costs a TLB flush each, which is slow in emulation.
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

/// Writes, reads and unmaps four times the machine's memory, half of it through each door.
pub fn four_times_the_memory() -> Result<()> {
    const SMALL: usize = (1 << 30) / PAGE;
    let memory = meminfo("MemTotal")?;
    if memory > SMALL {
        return skip("needs a machine with at most 1 GiB of memory, and uses all of it");
    }
    let (swaps, used) = (
        fs::read_to_string("/proc/swaps")?.lines().count(),
        swap_used()?,
    );
    let zram = Zram::new(4 * memory + SMALL / 16)?;
    // In a child, which may be killed, and which uses no more swap when the device is removed.
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
            // A page that is just being swapped may count twice.
            wait_until("all written pages present", || {
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
            expect_all_freed(fd)?;
            ensure!(info(fd)?.freed >= map.pages as u64, "{:?}", info(fd)?);
        }
        // Memory of other processes was swapped out as well, but there is little of it.
        let left = (meminfo("Shmem")? + swap_used()?).saturating_sub(before);
        ensure!(left < 2048, "Shmem and swap: {left} pages more than before");
        count("pages", 4 * memory as u64);
        Ok(())
    })?;
    let status = wait(child.pid)?;
    ensure!(status == 0, "status {status:#x}");

    drop(zram);
    let now = fs::read_to_string("/proc/swaps")?.lines().count();
    ensure!(now == swaps, "the swap device is still there");
    ensure!(
        swap_used()? <= used,
        "{} pages in swap, and {used} before",
        swap_used()?
    );
    Ok(())
}

/// The kernel's directory of knobs for each size of huge page, and that size in pages.
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

/// Unmaps parts of four huge pages of `size` pages each, at various places.
fn unmap_parts(fd: &OwnedFd, size: usize, hint: bool) -> Result<()> {
    let (place, all) = aligned(4 * size)?;
    for number in 0..4 {
        // A huge page may be as large as the mapping, so no mapping is larger than `size`.
        let map = all.part(number * size, size).cover(fd, number * size)?;
        if hint {
            map.advise(libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
        }
        map.fill(1 + (number * size) as u64);
    }
    expect_resident(fd, 4 * size, "touched")?;

    // Across two huge pages, a whole one, the middle of one, and inside one if it is large enough.
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

/// Huge pages of every size the kernel supports, with several settings of its knobs.
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
                    unmap_parts(&fd, *size, hint)
                        .with_context(|| format!("{mode}, each size {knob}, {size} pages"))?;
                }
                ensure!(
                    made()? >= before + 8,
                    "{mode}, {knob}: no huge pages of {size} pages were made"
                );
            }
        }
    }
    expect_shmem_back(shmem)
}

/// Huge pages that were swapped out whole are freed in swap, without reading any of them back.
pub fn huge_pages_freed_in_swap() -> Result<()> {
    const PAGES: usize = 16 * HUGE;
    let _huge = Setting::set(Path::new(THP).join("shmem_enabled"), "always")?;
    for fd in both_doors(PAGES)? {
        let (place, map) = aligned(PAGES)?;
        let map = map.cover(&fd, 0)?;
        map.fill(1);
        let whole = vmstat("thp_swpout")?;
        page_out(&fd, map)?;
        let whole = vmstat("thp_swpout")? - whole;
        ensure!(whole > 8, "only {whole} huge pages were swapped out whole");

        let read = vmstat("pswpin")?;
        map.unmap()?;
        let read = vmstat("pswpin")? - read;
        ensure!(
            read == 0,
            "{read} pages were read from swap in order to free them"
        );
        expect_all_freed(&fd)?;
        place.unmap()?;
    }
    Ok(())
}

/// Compacts the machine's memory again and again.
fn compaction() -> Result<Workers> {
    Workers::start(1, 0, |_, _| {
        // Pauses, as khugepaged runs at low priority and would make no progress otherwise.
        thread::sleep(Duration::from_millis(20));
        fs::write("/proc/sys/vm/compact_memory", "1").context("compact_memory")
    })
}

/// khugepaged collapses what guests map and unmap, while compaction moves small and huge pages.
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
    let guests = Workers::start(2, seed, |guest, rng| {
        let pause = Duration::from_millis(rng.u64(..300));
        guest_round([&dev, &file][guest], 0, HUGE, rng, |map| {
            // The pages are small already; from here on khugepaged may collapse them.
            map.advise(libc::MADV_HUGEPAGE)?;
            thread::sleep(pause);
            Ok(())
        })
    })?;
    // Only khugepaged makes huge pages here.
    let (start, mut seen) = (Instant::now(), 0);
    wait_until("khugepaged at work", || {
        guests.expect_alive()?;
        seen += usize::from(meminfo("ShmemHugePages")? > 0);
        Ok(start.elapsed() > TIME && seen >= 10)
    })?;
    guests.expect_progress()?;
    compaction.expect_progress()?;
    println!("huge pages seen {seen} times");
    guests.finish()?;
    compaction.finish()?;
    expect_all_freed(&dev).context("device")?;
    // A huge page that somebody held, so that it could not be split, stays in the ioctl's file: its
    // unmapped parts are zeroed, and freed with the file.
    println!("ioctl's file: {:?}", info(&file)?);
    drop(file);
    expect_shmem_back(shmem)
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
            skip("the kernel cannot move pages between nodes")
        }
        result => result.with_context(|| what.to_owned()),
    }
}

/// `MPOL_MF_MOVE` of `linux/mempolicy.h`.
const MPOL_MF_MOVE: c_int = 2;

/// Moves the pages of `map` to `node`, if given. Returns the node of each page afterwards.
fn move_pages(map: Map, node: Option<usize>) -> Result<Vec<c_int>> {
    let pages: Vec<_> = (0..map.pages).map(|page| map.word(page, 0)).collect();
    let to = node.map(|node| vec![node as c_int; map.pages]);
    let mut status = vec![-1; map.pages];
    let to = to.as_ref().map_or(ptr::null(), |to| to.as_ptr());
    // SAFETY: Three arrays of that length, of which the second may be null.
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

/// Moves the pages of process `pid` (0: this one) from node `from` to node `to`.
fn migrate_pages(pid: c_int, from: usize, to: usize) -> Result<c_int> {
    let (from, to): (c_ulong, c_ulong) = (1 << from, 1 << to);
    // SAFETY: Two bit masks of one word; the kernel subtracts one from the number of bits.
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
    // SAFETY: The test's own mapping, and a bit mask of one word.
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

/// Each of the three system calls moves pages between nodes, and their content survives.
pub fn pages_move_between_nodes(seed: u64) -> Result<()> {
    let nodes = nodes()?;
    let [one, two, ..] = nodes[..] else {
        return skip("only one NUMA node; boot with numa=fake=2");
    };
    // Keeps the kernel from moving pages on its own.
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
            // A page with an extra reference does not move, so retry until all have.
            let moved = |how: &str, node: usize, call: &dyn Fn() -> Result<()>| -> Result<()> {
                let all = || Ok(move_pages(map, None)?.iter().all(|at| *at == node as c_int));
                wait_until(how, || call().and_then(|()| all()))?;
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
            // The memory policy belongs to the object, so it applies to pages touched later.
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

    // Also while guests touch and unmap them.
    let fds = both_doors(4 * HUGE)?;
    let guests = Workers::start(4, seed, |guest, rng| {
        guest_round(&fds[guest % 2], guest / 2 * HUGE, HUGE / 4, rng, |_| Ok(()))
    })?;
    let start = Instant::now();
    let moved = vmstat("pgmigrate_success")?;
    wait_until("pages moved", || {
        guests.expect_alive()?;
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
    guests.expect_progress()?;
    guests.finish()?;
    fds.iter().try_for_each(expect_all_freed)?;
    expect_shmem_back(shmem)
}

/// CPU 1 goes offline and online, and compaction moves memory, while guests map, touch and unmap.
pub fn cpu_hotplug(seed: u64) -> Result<()> {
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";
    if !fs::exists(ONLINE)? {
        return skip("CPU 1 does not exist or cannot go offline");
    }
    let online = Setting::set(ONLINE, "1")?;
    let shmem = meminfo("Shmem")?;
    let fds = both_doors(4 * HUGE)?;
    let compaction = compaction()?;
    let guests = Workers::start(4, seed, |guest, rng| {
        guest_round(&fds[guest % 2], guest / 2 * HUGE, HUGE / 4, rng, |_| Ok(()))
    })?;
    let (start, mut times) = (Instant::now(), 0);
    while times < 4 || start.elapsed() < TIME {
        fs::write(ONLINE, "0").context("offline")?;
        guests.expect_progress()?;
        fs::write(ONLINE, "1").context("online")?;
        guests.expect_progress()?;
        times += 1;
    }
    println!("offline {times} times");
    guests.finish()?;
    compaction.expect_progress()?;
    compaction.finish()?;
    fds.iter().try_for_each(expect_all_freed)?;
    expect_shmem_back(shmem)?;
    drop(online);
    ensure!(
        fs::read_to_string(ONLINE)?.trim() == "1",
        "CPU 1 is not back online"
    );
    Ok(())
}
