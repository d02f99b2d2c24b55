// SPDX-License-Identifier: GPL-2.0

//! Duels: two processes act on the same pages at the same time.
//!
//! Each side owns a word in each page. While the side has the page mapped, its word must stay, or
//! become zero if somebody punched a hole. When both sides are done, nothing is mapped, so no page
//! may be left, and a new mapping must find zeros.

use crate::sys::*;
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::{HUGE, PAGES, SHMEM_ENABLED};

/// What one side does while the other does something else.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    /// Maps the pages and brings them in.
    Fault,
    /// Unmaps the pages, at once or in pieces.
    Unmap,
    /// Forks a child, whose exit unmaps the pages.
    Fork,
    /// Moves the mapping.
    Remap,
    /// Swaps the pages out.
    PageOut,
    /// Punches holes, with fallocate(2) where the file supports that.
    Punch,
    /// Punches holes with MADV_REMOVE.
    Remove,
    /// Collapses the pages into huge pages.
    Collapse,
    Lock,
    /// The only process of this side that maps the pages exits.
    Exit,
    /// As above, but it is killed with SIGKILL.
    Kill,
    /// Unmaps the pages while a pipe holds references to them.
    Pin,
}
use Act::*;

const PAIRS: &[(Act, Act)] = &[
    (Unmap, Fault),
    (Unmap, Unmap),
    (Punch, Fault),
    (Fork, Unmap),
    (Fork, Fault),
    (Remap, Fault),
    (Remap, Unmap),
    (PageOut, Unmap),
    (PageOut, Fault),
    (Collapse, Unmap),
    (Collapse, Fault),
    (Collapse, Exit),
    (Lock, Unmap),
    (Exit, Unmap),
    (Exit, Fault),
    (Kill, Unmap),
    (Kill, Fault),
    (Pin, Unmap),
    (Pin, PageOut),
    (Remove, Fault),
    (Remove, Unmap),
    (Remove, Fork),
    (Remove, Remap),
    (Remove, PageOut),
    (Remove, Punch),
    (Remove, Remove),
    (Remove, Collapse),
    (Remove, Lock),
    (Remove, Exit),
    (Remove, Kill),
    (Remove, Pin),
];

/// Duels of each pair before the next pair's turn.
const ROUNDS: u64 = 2;
/// Number of pages that each side writes to: all small pages, or a few of each huge page.
const WORDS: usize = 64;

/// Small pages go to swap; huge pages do not, as the driver has a gap where collapse and swap meet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PageMode {
    SmallPagesAndSwap,
    HugePages,
}

/// State shared by both sides.
struct Shared {
    met: AtomicU64,
    over: AtomicBool,
    failed: AtomicBool,
    duels: AtomicU64,
    punches: [Punches; WORDS],
}
const _: () = assert!(size_of::<Shared>() <= PAGE);

/// Numbers of holes punched in a page so far.
struct Punches {
    started: AtomicU64,
    ended: AtomicU64,
}

impl Shared {
    fn new() -> Result<&'static Self> {
        let map = Map::shared(&memfd(1)?, 1, 0)?;
        // SAFETY: Large enough, page-aligned, never unmapped; all zero is valid for atomics.
        Ok(unsafe { &*map.addr.cast() })
    }

    /// Waits for the other side.
    fn meet(&self) -> Result<()> {
        let met = self.met.fetch_add(1, SeqCst) + 1;
        let start = Instant::now();
        while self.met.load(SeqCst) < met.next_multiple_of(2) {
            ensure!(!self.failed.load(SeqCst), "the other side failed");
            // The other side may have crashed.
            ensure!(start.elapsed().as_secs() < 120, "the other side is gone");
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// What one side wrote: a tag, and for each page, how many punches had ended before the write and how
/// many had started after it.
struct Written {
    tag: u64,
    punches: Vec<(u64, u64)>,
}

struct Side<'a> {
    fd: &'a OwnedFd,
    has_fallocate: bool,
    huge: bool,
    me: usize,
    shared: &'static Shared,
    rng: fastrand::Rng,
    duels: u64,
}

impl Side<'_> {
    fn pages(&self) -> usize {
        if self.huge { PAGES } else { WORDS }
    }

    /// Distance between pages with words.
    fn step(&self) -> usize {
        self.pages() / WORDS
    }

    fn word(&self, map: Map, number: usize) -> *mut u64 {
        map.word(number * self.step(), 1 + self.me)
    }

    fn map(&self) -> Result<Map> {
        aligned(self.pages())?.cover(self.fd, 0)
    }

    fn write(&self, map: Map) -> Written {
        let tag = ((self.me as u64 + 1) << 56) | (self.duels << 16);
        let punches = (0..WORDS).map(|number| {
            let punches = &self.shared.punches[number];
            let ended = punches.ended.load(SeqCst);
            // SAFETY: Inside the mapping, and nobody else's word.
            unsafe { self.word(map, number).write_volatile(tag + number as u64) };
            (ended, punches.started.load(SeqCst))
        });
        Written {
            tag,
            punches: punches.collect(),
        }
    }

    fn verify(&self, map: Map, written: &Written) -> Result<()> {
        for (number, (ended_before, started_before)) in written.punches.iter().enumerate() {
            let (tag, punches) = (written.tag + number as u64, &self.shared.punches[number]);
            let ended = punches.ended.load(SeqCst);
            // SAFETY: As in `write`.
            let found = unsafe { self.word(map, number).read_volatile() };
            let started = punches.started.load(SeqCst);

            match found {
                0 => ensure!(started > *ended_before, "word {number} of {tag:#x} is lost"),
                // If more have ended than had started by then, one of them started after the write.
                _ if found == tag => ensure!(
                    ended <= *started_before,
                    "word {number} of {tag:#x} outlived a punched hole"
                ),
                _ => bail!("word {number}: {found:#x}, expected {tag:#x}"),
            }
        }
        Ok(())
    }

    /// Punches holes where the words are, all at once or page by page.
    fn punch(&mut self, map: Map, fallocate: bool) -> Result<()> {
        let words = if self.rng.bool() { WORDS } else { 1 };
        for first in (0..WORDS).step_by(words) {
            let part = map.part(first * self.step(), (words - 1) * self.step() + 1);
            let holes = &self.shared.punches[first..first + words];
            holes.iter().for_each(|hole| {
                hole.started.fetch_add(1, SeqCst);
            });
            if fallocate {
                let (offset, len) = (first * self.step() * PAGE, part.pages * PAGE);
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let fd = self.fd.as_raw_fd();
                // SAFETY: No memory involved.
                cvt(unsafe { libc::fallocate(fd, mode, offset as i64, len as i64) })?;
            } else {
                part.advise(libc::MADV_REMOVE).context("MADV_REMOVE")?;
            }
            holes.iter().for_each(|hole| {
                hole.ended.fetch_add(1, SeqCst);
            });
        }
        Ok(())
    }

    /// Waits for a short random time, so that the other side gets ahead.
    fn random_delay(&mut self) {
        let most = 1 << self.rng.u8(..12);
        let end = Instant::now() + Duration::from_micros(self.rng.u64(..most));
        while Instant::now() < end {}
    }

    /// One duel, in which this side does `act` and the other side `other`.
    fn duel(&mut self, act: Act, other: Act) -> Result<()> {
        self.duels += 1;
        match act {
            Fault => {
                self.start()?;
                let map = self.map()?;
                let written = self.write(map);
                self.random_delay();
                self.verify(map, &written)?;
                map.unmap()?;
            }
            Exit | Kill => self.end_of_a_process(act)?,
            Pin => self.pin(matches!(other, Punch | Remove))?,
            _ => self.act_on_a_mapping(act)?,
        }
        self.shared.meet()?;
        if self.me == 0 {
            self.shared.duels.store(self.duels, SeqCst);
            self.expect_nothing()?;
            if self.huge {
                // For the next duel: huge pages to split, or small pages to collapse.
                let enabled = ["always", "never"][self.rng.usize(..2)];
                std::fs::write(SHMEM_ENABLED, enabled)?;
            }
        }
        self.shared.meet()
    }

    fn start(&mut self) -> Result<()> {
        self.shared.meet()?;
        self.random_delay();
        Ok(())
    }

    fn act_on_a_mapping(&mut self, act: Act) -> Result<()> {
        let mut map = self.map()?;
        let written = self.write(map);
        if act == Unmap && !self.huge && self.rng.bool() {
            map.advise(libc::MADV_PAGEOUT)?;
        }

        self.start()?;
        match act {
            Unmap => {
                let pieces = [1, 2, WORDS][self.rng.usize(..3)];
                let pages = map.pages / pieces;
                return (0..pieces)
                    .rev()
                    .try_for_each(|piece| map.part(piece * pages, pages).unmap());
            }
            Fork => {
                let child = fork(|_| self.verify(map, &written))?;
                self.verify(map, &written)?;
                child.join()?;
            }
            Remap => {
                for _ in 0..2 {
                    let place = aligned(map.pages)?;
                    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                    map = map.remap(map.pages, flags, place.addr)?;
                    self.verify(map, &written)?;
                }
            }
            PageOut => map.advise(libc::MADV_PAGEOUT)?,
            Punch => self.punch(map, self.has_fallocate)?,
            Remove => self.punch(map, false)?,
            // The collapse fails if somebody else is using the pages.
            Collapse => drop(map.advise(libc::MADV_COLLAPSE)),
            Lock => map.lock()?,
            Fault | Exit | Kill | Pin => unreachable!(),
        }
        self.verify(map, &written)?;
        map.unmap()
    }

    fn end_of_a_process(&mut self, act: Act) -> Result<()> {
        let map = self.map()?;
        let written = self.write(map);
        let mut child = fork(|peer| {
            self.verify(map, &written)?;
            peer.meet()?;
            self.verify(map, &written)
        })?;
        map.unmap()?;

        self.start()?;
        if act == Kill {
            return child.kill();
        }
        child.meet()?;
        child.join()
    }

    /// A page in a pipe keeps its content. The exceptions are a punched hole, and a part of a huge page
    /// that is zeroed when it is unmapped.
    fn pin(&mut self, punched: bool) -> Result<()> {
        let map = self.map()?;
        let written = self.write(map);
        let (mut reader, writer) = pipe()?;
        let words: Vec<_> = (0..WORDS).step_by(WORDS / 8).collect();
        for number in &words {
            let vec = libc::iovec {
                iov_base: self.word(map, *number).cast(),
                iov_len: 8,
            };
            // SAFETY: A word of the mapping.
            let len = unsafe { libc::vmsplice(writer.as_raw_fd(), &vec, 1, 0) };
            ensure!(len == 8, "vmsplice: {}", std::io::Error::last_os_error());
        }

        self.start()?;
        map.unmap()?;
        for number in words {
            let mut word = [0; 8];
            reader.read_exact(&mut word)?;
            let (found, tag) = (u64::from_ne_bytes(word), written.tag + number as u64);
            ensure!(
                found == tag || (found == 0 && (punched || self.huge)),
                "a pipe has {found:#x}, expected {tag:#x}"
            );
        }
        Ok(())
    }

    /// Checks that no page is left and that no data comes back. Nobody maps the pages now.
    fn expect_nothing(&self) -> Result<()> {
        // Parts of a huge page may be left until its whole range is unmapped.
        if !self.huge {
            expect_resident(self.fd, 0, "all unmapped")?;
        }
        let map = self.map()?;
        for number in 0..WORDS {
            let page = number * self.step();
            for word in 0..3 {
                // SAFETY: Inside the mapping; nobody else maps the page now.
                let found = unsafe { map.word(page, word).read_volatile() };
                ensure!(found == 0, "page {page} came back with {found:#x}");
            }
        }
        map.unmap()?;
        expect_resident(self.fd, 0, "all unmapped again")
    }

    /// Duels until the time is up, but at least [`ROUNDS`] times for each pair.
    fn fight(&mut self, until: Instant) -> Result<()> {
        // Small pages are not collapsed, huge ones not swapped.
        let not_now = if self.huge { PageOut } else { Collapse };
        while !self.shared.over.load(SeqCst) {
            for &(one, two) in PAIRS {
                if one == not_now || two == not_now {
                    continue;
                }
                for _ in 0..ROUNDS {
                    let (act, other) = [(one, two), (two, one)][self.me];
                    self.duel(act, other)
                        .with_context(|| format!("{act:?} against {other:?}"))?;
                }
            }
            if self.me == 0 {
                self.shared.over.store(Instant::now() >= until, SeqCst);
            }
            self.shared.meet()?;
        }
        Ok(())
    }
}

/// Address space for `pages` pages, aligned for huge pages.
fn aligned(pages: usize) -> Result<Map> {
    let place = Map::reserve(pages + HUGE)?;
    let skip = place.addr.align_offset(HUGE * PAGE) / PAGE;
    if skip > 0 {
        place.part(0, skip).unmap()?;
    }
    place.part(skip + pages, HUGE - skip).unmap()?;
    Ok(place.part(skip, pages))
}

fn pipe() -> Result<(File, File)> {
    let mut fds = [0; 2];
    // SAFETY: The kernel writes two descriptors, which are new.
    unsafe {
        cvt(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC)).context("pipe2")?;
        Ok((File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])))
    }
}

/// Runs duels on `fd`, which nobody else has mapped. Returns how many there were.
pub fn duels(
    fd: &OwnedFd,
    has_fallocate: bool,
    mode: PageMode,
    seed: u64,
    until: Instant,
) -> Result<u64> {
    let shared = Shared::new()?;
    let sides = [0, 1].map(|me| {
        fork(|_| {
            let mut side = Side {
                fd,
                has_fallocate,
                huge: mode == PageMode::HugePages,
                me,
                shared,
                rng: fastrand::Rng::with_seed(seed ^ me as u64),
                duels: 0,
            };
            side.fight(until)
                .inspect_err(|_| shared.failed.store(true, SeqCst))
        })
    });
    for side in sides {
        side?.join()?;
    }
    Ok(shared.duels.load(SeqCst))
}
