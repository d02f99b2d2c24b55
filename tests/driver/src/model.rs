// SPDX-License-Identifier: GPL-2.0

//! Random operations by several processes on several objects, checked against a model of the rule.
//!
//! This process draws the operations and keeps the model. The others execute them, each in its own
//! arena of address space. After every operation, the driver's page counts of a randomly drawn
//! object must match the model, and every read must find the value that the model predicts.

use crate::sys::*;
use anyhow::{Context, Result, bail, ensure};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const SLOTS: usize = 6;
const ARENA: usize = 48;
const OBJECTS: usize = 4;
const OBJECT_PAGES: usize = 24;

/// A request to a process: a command and its arguments, then the object to count afterwards.
type Request = [u64; 7];

const MAP: u64 = 0;
const UNMAP: u64 = 1;
const COVER: u64 = 2;
const REMAP: u64 = 3;
const WRITE: u64 = 4;
const READ: u64 = 5;
const ADVISE: u64 = 6;
const PROTECT: u64 = 7;
const PWRITE: u64 = 8;
const PUNCH: u64 = 9;
const FORK: u64 = 10;
const EXIT: u64 = 11;

/// The process's reply: an errno, a value, and the object's numbers of present and freed pages.
type Reply = [u64; 4];

/// Number of requests that are sent together. Each is executed and counted before the next.
const BATCH: usize = 16;

/// Both ends of a slot's connection. Every process has all of them, and uses one.
struct Channel {
    ours: UnixStream,
    theirs: UnixStream,
}

fn send<const N: usize>(mut to: &UnixStream, messages: &[[u64; N]]) -> std::io::Result<()> {
    let bytes: Vec<u8> = messages
        .as_flattened()
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    to.write_all(&bytes)
}

fn receive<const N: usize>(mut from: &UnixStream) -> std::io::Result<[u64; N]> {
    let mut bytes = [[0; 8]; N];
    from.read_exact(bytes.as_flattened_mut())?;
    Ok(bytes.map(u64::from_ne_bytes))
}

/// The objects, and their `fdinfo` files in the process that keeps the model.
struct Objects {
    fds: Vec<OwnedFd>,
    infos: Vec<File>,
}

impl Objects {
    fn make() -> Result<Self> {
        let fds = (0..OBJECTS)
            .map(|object| {
                if object < OBJECTS / 2 {
                    device()
                } else {
                    ioctl_file(OBJECT_PAGES)
                }
            })
            .collect::<Result<Vec<_>>>()?;
        let infos = fds
            .iter()
            .map(|fd| {
                File::open(format!(
                    "/proc/{}/fdinfo/{}",
                    std::process::id(),
                    fd.as_raw_fd()
                ))
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        Ok(Self { fds, infos })
    }

    /// Numbers of present and freed pages of an object.
    fn counts(&self, object: usize) -> Result<[u64; 2]> {
        let mut text = [0; 512];
        let len = self.infos[object].read_at(&mut text, 0)?;
        let info = parse_info(std::str::from_utf8(&text[..len])?)?;
        Ok([(info.resident + info.swapped) as u64, info.freed])
    }
}

/// Executes requests until told to exit.
fn serve(mut slot: usize, channels: &[Channel], objects: &Objects, arena: Map) -> ! {
    let mut work = || -> Result<()> {
        loop {
            let request: Request = receive(&channels[slot].theirs)?;
            let result = match request[0] {
                EXIT => return Ok(()),
                FORK => {
                    // SAFETY: The child continues this loop, with its own slot.
                    let pid = unsafe { libc::fork() };
                    if pid == 0 {
                        slot = request[1] as usize;
                        continue;
                    }
                    cvt(pid).map(|pid| pid as u64)
                }
                _ => execute(&request, objects, arena),
            };
            let mut reply: Reply = [0; 4];
            match result {
                Ok(value) => reply[1] = value,
                Err(err) => reply[0] = err.raw_os_error().unwrap_or(1) as u64,
            }
            reply[2..].copy_from_slice(&objects.counts(request[6] as usize)?);
            send(&channels[slot].theirs, &[reply])?;
        }
    };
    let status = i32::from(work().is_err());
    // SAFETY: Ends this process.
    unsafe { libc::_exit(status) }
}

fn execute(request: &Request, objects: &Objects, arena: Map) -> std::io::Result<u64> {
    let [command, at, len, a, b, c, _] = *request;
    let range = || arena.part(at as usize, len as usize);
    match command {
        MAP => {
            let kind = if c == 0 {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE
            };
            let fd = objects.fds[a as usize].as_raw_fd();
            Map::new(
                range().addr,
                range().pages,
                RW,
                kind | libc::MAP_FIXED,
                fd,
                b as usize,
            )?;
        }
        UNMAP => {
            // SAFETY: A part of this process's own arena.
            cvt(unsafe { libc::munmap(range().addr.cast(), range().pages * PAGE) })?;
        }
        COVER => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            Map::new(range().addr, range().pages, libc::PROT_NONE, flags, -1, 0)?;
        }
        REMAP => {
            let to = arena.part(a as usize, b as usize);
            range().remap(to.pages, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to.addr)?;
        }
        WRITE => range().write(0, a),
        READ => return Ok(range().read(0)),
        ADVISE => range().advise(a as i32)?,
        PROTECT => range()
            .protect(libc::PROT_READ)
            .and_then(|()| range().protect(RW))?,
        PWRITE => {
            let value = c.to_ne_bytes();
            let offset = b as i64 * PAGE as i64;
            // SAFETY: Eight bytes of this process.
            return Ok(cvt(unsafe {
                libc::pwrite(
                    objects.fds[a as usize].as_raw_fd(),
                    value.as_ptr().cast(),
                    8,
                    offset,
                )
            } as i32)? as u64);
        }
        _ => {
            assert!(command == PUNCH);
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let (fd, offset) = (objects.fds[a as usize].as_raw_fd(), b as i64 * PAGE as i64);
            // SAFETY: No memory involved.
            cvt(unsafe { libc::fallocate(fd, mode, offset, PAGE as i64) })?;
        }
    }
    Ok(0)
}

/// A page of a process's arena that maps a page of an object.
#[derive(Clone, Copy, Debug)]
struct Cell {
    object: usize,
    page: usize,
    private: bool,
    /// A private mapping's own copy, once written.
    copy: Option<u64>,
    /// Adjacent cells with the same number belong to one VMA.
    vma: u64,
}

type Arena = [Option<Cell>; ARENA];

struct Process {
    pid: i32,
    arena: Arena,
}

/// A page that exists. One that does not exist reads as zero.
#[derive(Clone, Copy, Default)]
struct Page {
    value: u64,
    /// Never written, so still all zero, and subject to MADV_PAGEOUT: the kernel may have dropped the
    /// page instead of swapping it out.
    maybe_dropped: bool,
    written: bool,
}

impl Page {
    fn written(value: u64) -> Option<Self> {
        Some(Self {
            value,
            written: true,
            maybe_dropped: false,
        })
    }
}

#[derive(Clone, Default)]
struct Object {
    pages: [Option<Page>; OBJECT_PAGES],
    /// Pages certainly freed by unmapping since the object was last counted.
    freed: u64,
    /// Pages freed by unmapping that may have been dropped before.
    maybe_freed: u64,
}

/// The counts that the driver has to report for an object after an operation.
struct Counts {
    pages: RangeInclusive<u64>,
    /// The increase since the object was last counted.
    freed: RangeInclusive<u64>,
}

impl Object {
    fn take_counts(&mut self) -> Counts {
        let most = self.pages.iter().flatten().count() as u64;
        let dropped = self
            .pages
            .iter()
            .flatten()
            .filter(|page| page.maybe_dropped)
            .count() as u64;
        let freed = std::mem::take(&mut self.freed);
        let maybe = std::mem::take(&mut self.maybe_freed);
        Counts {
            pages: most - dropped..=most,
            freed: freed..=freed + maybe,
        }
    }
}

/// A drawn request, and the result that the model expects.
struct Expectation {
    operation: u64,
    what: String,
    request: Request,
    value: u64,
    counts: Counts,
}

struct Model<'a> {
    rng: fastrand::Rng,
    driver: &'a Objects,
    channels: &'a [Channel],
    processes: [Option<Process>; SLOTS],
    objects: Vec<Object>,
    last_unique: u64,
    operation: u64,
    /// Drawn, but not sent yet. All of them are for one slot.
    pending: (usize, Vec<Expectation>),
    /// The last count of freed pages that the driver reported, for each object.
    freed: [u64; OBJECTS],
    history: VecDeque<String>,
}

impl Model<'_> {
    fn unique(&mut self) -> u64 {
        self.last_unique += 1;
        self.last_unique
    }

    /// Queues a request. Call this after updating the model for it.
    fn expect(&mut self, slot: usize, request: [u64; 6], value: u64, what: String) -> Result<()> {
        let object = self.rng.usize(..OBJECTS);
        let counts = self.objects[object].take_counts();
        let [command, at, len, a, b, c] = request;
        if self.pending.0 != slot || self.pending.1.len() == BATCH {
            self.flush()?;
        }
        self.pending.0 = slot;
        self.pending.1.push(Expectation {
            operation: self.operation,
            what: format!("process {slot}: {what}"),
            request: [command, at, len, a, b, c, object as u64],
            value,
            counts,
        });
        Ok(())
    }

    /// Sends the pending requests, and compares the replies.
    fn flush(&mut self) -> Result<()> {
        let (slot, expectations) = (self.pending.0, std::mem::take(&mut self.pending.1));
        let requests: Vec<_> = expectations
            .iter()
            .map(|expected| expected.request)
            .collect();
        send(&self.channels[slot].ours, &requests)?;
        for expected in expectations {
            self.note(expected.what);
            let reply: Reply = receive(&self.channels[slot].ours)
                .with_context(|| format!("no reply from process {slot}"))?;
            let operation = expected.operation;
            ensure!(reply[0] == 0, "operation {operation}: errno {}", reply[0]);
            if expected.request[0] == FORK {
                self.processes[expected.request[1] as usize]
                    .as_mut()
                    .expect("just forked")
                    .pid = reply[1] as i32;
            } else {
                ensure!(
                    reply[1] == expected.value,
                    "operation {operation}: {}, expected {}",
                    reply[1],
                    expected.value
                );
            }
            let object = expected.request[6] as usize;
            self.compare(object, [reply[2], reply[3]], &expected.counts)
                .with_context(|| format!("operation {operation}"))?;
        }
        Ok(())
    }

    fn note(&mut self, what: String) {
        if self.history.len() == 30 {
            self.history.pop_front();
        }
        self.history.push_back(what);
    }

    /// Compares the driver's counts of an object with the model's.
    fn compare(&mut self, object: usize, found: [u64; 2], expected: &Counts) -> Result<()> {
        let [pages, freed] = found;
        ensure!(
            expected.pages.contains(&pages),
            "object {object} has {pages} pages, expected {:?}",
            expected.pages
        );
        let more = freed - self.freed[object];
        ensure!(
            expected.freed.contains(&more),
            "object {object}: {more} pages freed, expected {:?}",
            expected.freed
        );
        self.freed[object] = freed;
        Ok(())
    }

    fn arena(&mut self, slot: usize) -> &mut Arena {
        &mut self.processes[slot].as_mut().expect("a live process").arena
    }

    fn is_covered(&self, object: usize, page: usize) -> bool {
        self.processes
            .iter()
            .flatten()
            .flat_map(|process| process.arena.iter().flatten())
            .any(|cell| (cell.object, cell.page) == (object, page))
    }

    /// Applies the rule to cells that were just removed from an arena.
    fn close(&mut self, cells: Vec<Cell>) {
        for cell in cells {
            if !self.is_covered(cell.object, cell.page) {
                let object = &mut self.objects[cell.object];
                if let Some(page) = object.pages[cell.page].take() {
                    if page.maybe_dropped {
                        object.maybe_freed += 1;
                    } else {
                        object.freed += 1;
                    }
                }
            }
        }
    }

    fn take(&mut self, slot: usize, at: usize, len: usize) -> Vec<Cell> {
        self.arena(slot)[at..at + len]
            .iter_mut()
            .filter_map(Option::take)
            .collect()
    }

    fn unmap(&mut self, slot: usize, at: usize, len: usize) {
        let cells = self.take(slot, at, len);
        self.close(cells);
    }

    /// The value that a touch of a cell finds. The touch brings in the object's page, unless the cell
    /// has a copy.
    fn touch(&mut self, cell: Cell) -> u64 {
        cell.copy.unwrap_or_else(|| {
            let page = self.objects[cell.object].pages[cell.page].get_or_insert_default();
            page.maybe_dropped = false;
            page.value
        })
    }

    fn draw_range(&mut self) -> (usize, usize) {
        let at = self.rng.usize(..ARENA);
        (at, self.rng.usize(1..=12.min(ARENA - at)))
    }

    /// A mapped cell of the process, if any.
    fn draw_cell(&mut self, slot: usize) -> Option<(usize, Cell)> {
        let mapped: Vec<_> = self
            .arena(slot)
            .iter()
            .enumerate()
            .filter_map(|(at, cell)| cell.map(|cell| (at, cell)))
            .collect();
        self.rng.choice(mapped)
    }

    /// A run of cells of one VMA, if any.
    fn draw_run(&mut self, slot: usize) -> Option<(usize, usize, Cell)> {
        let (at, cell) = self.draw_cell(slot)?;
        let most = self.rng.usize(1..=8);
        let run = self.arena(slot)[at..]
            .iter()
            .take(most)
            .take_while(|other| other.is_some_and(|other| other.vma == cell.vma))
            .count();
        Some((at, run, cell))
    }

    /// Draws an operation and queues it. Returns false if there is nothing to apply it to.
    fn step(&mut self) -> Result<bool> {
        let live: Vec<_> = (0..SLOTS)
            .filter(|slot| self.processes[*slot].is_some())
            .collect();
        // Mostly stays with the same process for a while.
        let slot = match self.pending.0 {
            slot if live.contains(&slot) && self.rng.u8(..8) != 0 => slot,
            _ => self
                .rng
                .choice(live.iter().copied())
                .expect("one process is always left"),
        };

        match self.rng.u32(..96) {
            0..18 => {
                let (at, mut len) = self.draw_range();
                let object = self.rng.usize(..OBJECTS);
                let page = self.rng.usize(..OBJECT_PAGES);
                len = len.min(OBJECT_PAGES - page);
                let private = self.rng.u8(..4) == 0;
                self.unmap(slot, at, len);
                let vma = self.unique();
                for (index, cell) in self.arena(slot)[at..at + len].iter_mut().enumerate() {
                    *cell = Some(Cell {
                        object,
                        page: page + index,
                        private,
                        copy: None,
                        vma,
                    });
                }
                let what = format!("map {at}+{len} object {object} page {page} private {private}");
                let [at, len, object, page] = [at, len, object, page].map(|number| number as u64);
                self.expect(slot, [MAP, at, len, object, page, private.into()], 0, what)?;
            }
            18..26 => {
                let (at, len) = self.draw_range();
                let (command, how) = if self.rng.bool() {
                    (UNMAP, "unmap")
                } else {
                    (COVER, "cover")
                };
                self.unmap(slot, at, len);
                let request = [command, at as u64, len as u64, 0, 0, 0];
                self.expect(slot, request, 0, format!("{how} {at}+{len}"))?;
            }
            26..32 => return self.remap(slot),
            32..60 => {
                let Some((at, cell)) = self.draw_cell(slot) else {
                    return Ok(false);
                };
                let value = self.unique();
                self.touch(cell);
                if cell.private {
                    self.arena(slot)[at] = Some(Cell {
                        copy: Some(value),
                        ..cell
                    });
                } else {
                    self.objects[cell.object].pages[cell.page] = Page::written(value);
                }
                let request = [WRITE, at as u64, 1, value, 0, 0];
                self.expect(slot, request, 0, format!("write {at}: {cell:?} = {value}"))?;
            }
            60..76 => {
                let Some((at, cell)) = self.draw_cell(slot) else {
                    return Ok(false);
                };
                self.read(slot, at, cell)?;
            }
            76..84 => return self.advise(slot),
            84..88 => {
                let Some((at, len, cell)) = self.draw_run(slot) else {
                    return Ok(false);
                };
                // The VMA is split at both ends, and may stay so.
                let (middle, right) = (self.unique(), self.unique());
                for (index, other) in self.arena(slot).iter_mut().enumerate().skip(at) {
                    if let Some(other) = other.as_mut().filter(|other| other.vma == cell.vma) {
                        other.vma = if index < at + len { middle } else { right };
                    }
                }
                let request = [PROTECT, at as u64, len as u64, 0, 0, 0];
                self.expect(
                    slot,
                    request,
                    0,
                    format!("protect and unprotect {at}+{len}"),
                )?;
            }
            88..92 => {
                // By write(2) and fallocate(2), which only files of the ioctl support.
                let object = OBJECTS / 2 + self.rng.usize(..OBJECTS / 2);
                let page = self.rng.usize(..OBJECT_PAGES);
                let target = [object as u64, page as u64];
                if self.rng.bool() {
                    let value = self.unique();
                    self.objects[object].pages[page] = Page::written(value);
                    let what = format!("pwrite object {object} page {page} = {value}");
                    self.expect(slot, [PWRITE, 0, 0, target[0], target[1], value], 8, what)?;
                } else {
                    self.objects[object].pages[page] = None;
                    let what = format!("punch object {object} page {page}");
                    self.expect(slot, [PUNCH, 0, 0, target[0], target[1], 0], 0, what)?;
                }
            }
            92..94 => {
                let Some(free) = (0..SLOTS).find(|slot| self.processes[*slot].is_none()) else {
                    return Ok(false);
                };
                let arena = *self.arena(slot);
                self.processes[free] = Some(Process { pid: 0, arena });
                let request = [FORK, free as u64, 0, 0, 0, 0];
                self.expect(slot, request, 0, format!("fork to {free}"))?;
                // The reply contains the child's pid.
                self.flush()?;
            }
            _ => {
                if live.len() == 1 {
                    return Ok(false);
                }
                let by_exit = self.rng.bool();
                self.end(slot, by_exit)?;
            }
        }
        Ok(true)
    }

    /// Moves a run of cells, and grows or shrinks it on the way.
    fn remap(&mut self, slot: usize) -> Result<bool> {
        let Some((from, len, cell)) = self.draw_run(slot) else {
            return Ok(false);
        };
        let new_len = self.rng.usize(1..=2 * len).min(OBJECT_PAGES - cell.page);
        let to = self.rng.usize(..=ARENA - new_len);
        if from < to + new_len && to < from + len {
            return Ok(false);
        }

        // In the kernel's order: first the destination is unmapped, then the cut-off tail.
        self.unmap(slot, to, new_len);
        let kept = len.min(new_len);
        self.unmap(slot, from + kept, len - kept);
        let vma = self.unique();
        for index in 0..new_len {
            let old = if index < kept {
                self.arena(slot)[from + index].take()
            } else {
                None
            };
            let new = Cell {
                page: cell.page + index,
                copy: None,
                ..cell
            };
            self.arena(slot)[to + index] = Some(Cell {
                vma,
                ..old.unwrap_or(new)
            });
        }
        let what = format!("remap {from}+{len} to {to}+{new_len}");
        let [from, len, to, new_len] = [from, len, to, new_len].map(|number| number as u64);
        self.expect(slot, [REMAP, from, len, to, new_len, 0], 0, what)?;
        Ok(true)
    }

    fn advise(&mut self, slot: usize) -> Result<bool> {
        let Some((at, len, cell)) = self.draw_run(slot) else {
            return Ok(false);
        };
        let advices = [
            libc::MADV_DONTNEED,
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_REMOVE,
        ];
        let advice = advices[self.rng.usize(..advices.len())];
        if advice == libc::MADV_REMOVE && cell.private {
            return Ok(false);
        }
        for at in at..at + len {
            let Some(cell) = self.arena(slot)[at] else {
                continue;
            };
            let page = &mut self.objects[cell.object].pages[cell.page];
            match advice {
                libc::MADV_REMOVE => *page = None,
                libc::MADV_DONTNEED => self.arena(slot)[at] = Some(Cell { copy: None, ..cell }),
                libc::MADV_PAGEOUT => {
                    if let Some(page) = page {
                        page.maybe_dropped = !page.written;
                    }
                }
                _ => {}
            }
        }
        let request = [ADVISE, at as u64, len as u64, advice as u64, 0, 0];
        self.expect(slot, request, 0, format!("advice {advice} {at}+{len}"))?;
        Ok(true)
    }

    fn read(&mut self, slot: usize, at: usize, cell: Cell) -> Result<()> {
        let value = self.touch(cell);
        let request = [READ, at as u64, 1, 0, 0, 0];
        self.expect(slot, request, value, format!("read {at}: {cell:?}"))
    }

    /// Ends a process by exit or SIGKILL, waits until its memory is gone, and compares.
    fn end(&mut self, slot: usize, by_exit: bool) -> Result<()> {
        self.flush()?;
        let Some(process) = self.processes[slot].take() else {
            return Ok(());
        };
        self.note(format!("process {slot} ends, by exit {by_exit}"));
        // SAFETY: The descriptor is new.
        let pidfd = unsafe {
            OwnedFd::from_raw_fd(cvt(
                libc::syscall(libc::SYS_pidfd_open, process.pid, 0) as i32
            )?)
        };
        if by_exit {
            send(&self.channels[slot].ours, &[[EXIT, 0, 0, 0, 0, 0, 0]])?;
        } else {
            // SAFETY: A process of this test.
            cvt(unsafe { libc::kill(process.pid, libc::SIGKILL) })?;
        }
        let mut poll = libc::pollfd {
            fd: pidfd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: One structure of this process.
        ensure!(
            unsafe { libc::poll(&mut poll, 1, 30_000) } == 1,
            "process {slot} does not exit"
        );
        self.close(process.arena.into_iter().flatten().collect());

        for object in 0..OBJECTS {
            let expected = self.objects[object].take_counts();
            self.compare(object, self.driver.counts(object)?, &expected)
                .with_context(|| format!("operation {}: process {slot} ended", self.operation))?;
        }
        Ok(())
    }

    /// Reads every mapped page of every process.
    fn check_contents(&mut self) -> Result<()> {
        for slot in 0..SLOTS {
            for at in 0..ARENA {
                let cell = self.processes[slot]
                    .as_ref()
                    .and_then(|process| process.arena[at]);
                if let Some(cell) = cell {
                    self.read(slot, at, cell)?;
                }
            }
        }
        self.flush()
    }

    fn run(&mut self, operations: u64) -> Result<()> {
        while self.operation < operations {
            if self.step()? {
                self.operation += 1;
                if self.operation % 1024 == 0 {
                    self.check_contents()?;
                }
            }
        }
        self.check_contents()?;
        (0..SLOTS).try_for_each(|slot| self.end(slot, true))?;
        for (number, object) in self.objects.iter().enumerate() {
            // Only data that was written and never mapped is left.
            ensure!(
                number >= OBJECTS / 2 || object.pages.iter().all(Option::is_none),
                "the model is wrong"
            );
        }
        Ok(())
    }
}

/// Runs `operations` operations, drawn with `seed`.
pub fn random_operations(seed: u64, operations: u64) -> Result<()> {
    // Killed processes need not be reaped, no matter whose children they are.
    // SAFETY: No handler involved.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    let objects = Objects::make()?;
    let channels = (0..SLOTS)
        .map(|_| {
            let (ours, theirs) = UnixStream::pair()?;
            // Every process holds both ends, so only a timeout shows that one has died.
            ours.set_read_timeout(Some(Duration::from_secs(30)))?;
            Ok(Channel { ours, theirs })
        })
        .collect::<std::io::Result<Vec<_>>>()?;
    let arena = Map::reserve(ARENA)?;
    // SAFETY: Single-threaded so far.
    let pid = cvt(unsafe { libc::fork() })?;
    if pid == 0 {
        serve(0, &channels, &objects, arena);
    }

    let mut model = Model {
        rng: fastrand::Rng::with_seed(seed),
        driver: &objects,
        channels: &channels,
        processes: [const { None }; SLOTS],
        objects: vec![Object::default(); OBJECTS],
        last_unique: 0,
        operation: 0,
        pending: (0, Vec::new()),
        freed: [0; OBJECTS],
        history: VecDeque::new(),
    };
    model.processes[0] = Some(Process {
        pid,
        arena: [None; ARENA],
    });
    let result = model.run(operations);
    for process in model.processes.iter().flatten() {
        // SAFETY: A process of this test.
        unsafe { libc::kill(process.pid, libc::SIGKILL) };
    }
    if let Err(err) = result {
        for line in &model.history {
            println!("# {line}");
        }
        bail!("{err:#}; --seed {seed} replays it");
    }
    count("operations", operations);
    Ok(())
}
