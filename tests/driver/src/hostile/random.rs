// SPDX-License-Identifier: GPL-2.0

//! Random system calls by several unprivileged processes at once, on everything they can reach.
//!
//! The calls' results do not matter, but three things must not happen: a process is killed by
//! anything but its own access; something is not freed in the end; anyone sees another user's page.
//! To detect the last, these processes write only zeros and one other byte, so any other data they
//! find is foreign. A witness process of another user has memory of the same driver, filled with a
//! different word, which it constantly maps, unmaps and verifies.

use super::{HOSTILE, OTHER, Ring, become_user, pipe};
use crate::sys::*;
use anyhow::{Context, Result, bail, ensure};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering::*};
use std::time::{Duration, Instant};
use std::{fs, ptr};

/// Pages of a huge page.
const HUGE: usize = 512;
/// Pages that calls operate on: two huge pages' worth.
const ARENA: usize = 2 * HUGE;
/// The arena's address: far below any address the kernel chooses itself. So nothing else is mapped
/// into its holes, and a call that goes too far hits nothing.
const PLACE: usize = 0x20_0000_0000;
/// The only non-zero byte these processes write, and a word of it.
const OWN: u8 = 0xa5;
const OWN_WORD: u64 = u64::from_ne_bytes([OWN; 8]);
/// The word that the witness writes, and its number of pages.
const SECRET: u64 = 0x5ec2_e7ed_5ec2_e7ed;
const SECRET_PAGES: usize = 128;

/// Number of processes kept running. They fork, up to a limit.
const PROCESSES: i64 = 4;
const LIMITS: [(libc::__rlimit_resource_t, u64); 6] = [
    (libc::RLIMIT_NPROC, 12),
    (libc::RLIMIT_AS, 256 << 20),
    (libc::RLIMIT_MEMLOCK, 1 << 20),
    (libc::RLIMIT_FSIZE, (ARENA * PAGE) as u64),
    (libc::RLIMIT_NOFILE, 64),
    (libc::RLIMIT_CORE, 0),
];
/// Number of descriptors a process keeps for calls.
const FDS: usize = 24;

/// State shared by the processes.
struct Shared {
    calls: AtomicU64,
    /// Number of processes so far, which numbers each of them.
    processes: AtomicU64,
    /// Approximate number of live processes.
    alive: AtomicI64,
    pids: [AtomicI32; 16],
    witness: AtomicI32,
    stop_witness: AtomicBool,
}

/// The result of a successful call.
enum Gives {
    Nothing,
    Descriptor,
    /// That many bytes of memory.
    Memory(u64),
    /// The call must not succeed.
    Errors,
}

type Call = (i64, [u64; 6]);
const NOTHING: Call = (libc::SYS_sched_yield, [0; 6]);

struct Process<'a> {
    rng: fastrand::Rng,
    shared: &'a Shared,
    arena: Map,
    /// The witness's memory.
    secret: Map,
    fds: Vec<OwnedFd>,
    /// Mappings outside the arena.
    elsewhere: VecDeque<Map>,
    /// Arguments of calls in the first page, and their output in the others.
    scratch: Map,
    ring: Option<Ring>,
    /// The last buffer registered with `ring`.
    pinned: [u64; 2],
    userfaultfd: Option<i32>,
    pidfd: Option<OwnedFd>,
    history: VecDeque<(Call, i64)>,
}

/// Invalid addresses.
const BAD: [u64; 8] = [
    0,
    1,
    0x7fff_ffff_f000,
    0x8000_0000_0000,
    0xffff_8880_0000_0000,
    0xffff_ffff_8100_0000,
    0xffff_ffff_ff60_0000,
    u64::MAX - 0xfff,
];
/// A length that wraps around from any address but 0.
const WRAPS: u64 = u64::MAX - 0xfff;

const AT_EMPTY_PATH: u64 = libc::AT_EMPTY_PATH as u64;
/// The memory ioctls of userfaultfd(2), and the number of argument words set for each.
const UFFDIO: [(u64, usize); 8] = [
    (0xc020_aa00, 3), // REGISTER
    (0x8010_aa01, 2), // UNREGISTER
    (0xc028_aa03, 4), // COPY
    (0xc020_aa04, 3), // ZEROPAGE
    (0xc028_aa05, 4), // MOVE
    (0xc018_aa06, 3), // WRITEPROTECT
    (0xc020_aa07, 3), // CONTINUE
    (0xc020_aa08, 3), // POISON
];

impl Process<'_> {
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.rng.usize(..of.len())]
    }

    /// The union of the bits in `of`, each with a probability of 1/4.
    fn some_bits(&mut self, of: &[i32]) -> u64 {
        of.iter()
            .filter(|_| self.rng.u8(..4) == 0)
            .fold(0, |all, bit| all | *bit as u64)
    }

    /// A page of the arena or of a file. Usually one of the first 48, so that calls collide.
    fn page(&mut self) -> usize {
        match self.rng.u8(..4) {
            0 => self.rng.usize(..ARENA),
            _ => self.rng.usize(..48),
        }
    }

    /// A part of the arena.
    fn part(&mut self) -> Map {
        let page = self.page();
        let most = match self.rng.u8(..16) {
            0 => ARENA,
            _ => 8,
        };
        let pages = self.rng.usize(1..=most.min(ARENA - page));
        self.arena.part(page, pages)
    }

    /// An address and a length, inside the arena unless deliberately invalid.
    fn range(&mut self) -> [u64; 2] {
        let part = self.part();
        let (addr, len) = (part.addr as u64, (part.pages * PAGE) as u64);
        match self.rng.u8(..80) {
            0 => [self.pick(&BAD), PAGE as u64],
            1 => [addr, WRAPS],
            2 => [addr + self.rng.u64(1..PAGE as u64), len],
            3 => [addr, self.rng.u64(..len)],
            4 => [addr, 0],
            _ => [addr, len],
        }
    }

    /// As above, for data. Nothing is mapped beyond the arena, so any length is safe.
    fn data(&mut self) -> [u64; 2] {
        let [addr, len] = self.range();
        match self.rng.u8(..32) {
            0 => [addr, 1 << self.rng.u8(20..63)],
            1 => [addr + self.rng.u64(..64), len],
            _ => [addr, len],
        }
    }

    fn offset(&mut self) -> u64 {
        let near = (self.page() * PAGE) as u64;
        match self.rng.u8(..32) {
            0 => i64::MAX as u64 & !0xfff,
            1 => 1 << self.rng.u8(30..63),
            2 => WRAPS,
            3 => near + self.rng.u64(..PAGE as u64),
            _ => near,
        }
    }

    fn fd(&mut self) -> u64 {
        match self.rng.u8(..40) {
            0 => u64::MAX,
            1 => libc::AT_FDCWD as u64,
            _ if self.fds.is_empty() => u64::MAX,
            // The initial descriptors, which are those of memory.
            2..20 => self.fds[self.rng.usize(..self.fds.len().min(4))].as_raw_fd() as u64,
            _ => self.fds[self.rng.usize(..self.fds.len())].as_raw_fd() as u64,
        }
    }

    /// Stores words as arguments for a call, and returns their address.
    fn words(&mut self, at: usize, words: &[u64]) -> u64 {
        for (index, word) in words.iter().enumerate() {
            // SAFETY: In the first scratch page, which is only used for arguments.
            unsafe { self.scratch.word(0, at + index).write_volatile(*word) };
        }
        self.scratch.word(0, at) as u64
    }

    fn text(&mut self, text: &str) -> u64 {
        let mut words = vec![0; text.len() / 8 + 1];
        for (index, byte) in text.bytes().enumerate() {
            words[index / 8] |= u64::from(byte) << (index % 8 * 8);
        }
        self.words(0, &words)
    }

    /// Address for the output of calls.
    fn out(&self) -> u64 {
        self.scratch.word(1, 0) as u64
    }

    /// The address and number of up to four vectors.
    fn vectors(&mut self, at: usize) -> [u64; 2] {
        let number = self.rng.usize(1..=4);
        let vectors: Vec<_> = (0..number).flat_map(|_| self.data()).collect();
        [self.words(at, &vectors), number as u64]
    }

    /// The pid of one of the latest of these processes, which is likely to be alive.
    fn peer(&mut self) -> u64 {
        let next = self.shared.processes.load(Relaxed) as usize;
        let number = next - self.rng.usize(1..=next.min(6));
        self.shared.pids[number % self.shared.pids.len()].load(Relaxed) as u64
    }

    /// The pid of one of these processes, or of the witness.
    fn pid(&mut self) -> u64 {
        match self.rng.u8(..4) {
            0 => self.shared.witness.load(Relaxed) as u64,
            _ => self.peer(),
        }
    }

    /// `gives`, unless process `pid` is the witness: then the call must not succeed.
    fn unless_witness(&self, pid: u64, gives: Gives) -> Gives {
        if pid == self.shared.witness.load(Relaxed) as u64 {
            Gives::Errors
        } else {
            gives
        }
    }

    fn call(&mut self, call: Call) -> i64 {
        let (number, [a, b, c, d, e, f]) = call;
        if self.history.len() == 16 {
            self.history.pop_front();
        }
        // SAFETY: Calls are drawn so that they only change memory in the arena, in known mappings,
        // or in the scratch pages.
        let ret = unsafe { libc::syscall(number, a, b, c, d, e, f) };
        let ret = match cvt(if ret < 0 { -1 } else { 0 }) {
            Ok(_) => ret,
            Err(err) => -i64::from(err.raw_os_error().unwrap_or(1)),
        };
        self.history.push_back((call, ret));
        ret
    }

    /// Fails if the readable part of `[addr, addr + len)` holds data that none of these processes
    /// wrote.
    fn check_data(&mut self, addr: u64, len: usize) -> Result<()> {
        let room = (self.scratch.pages - 1) * PAGE;
        let (mut addr, mut left) = (addr, len);
        while left > 0 {
            let ours = libc::iovec {
                iov_base: self.out() as *mut _,
                iov_len: room.min(left),
            };
            let theirs = libc::iovec {
                iov_base: addr as *mut _,
                ..ours
            };
            // Not by plain loads: unreadable memory must only end the loop, not the process.
            // SAFETY: The scratch pages have room for that much.
            let got = unsafe {
                libc::process_vm_readv(std::process::id() as i32, &ours, 1, &theirs, 1, 0)
            };
            if got <= 0 {
                break;
            }
            // SAFETY: That many bytes were just written there, and nobody writes any more.
            let bytes =
                unsafe { std::slice::from_raw_parts(self.out() as *const u8, got as usize) };
            // The comparison of whole words is the fast path.
            let foreign = |word: &[u8]| {
                word != [0; 8]
                    && word != [OWN; 8]
                    && word.iter().any(|byte| ![0, OWN].contains(byte))
            };
            if let Some(at) = bytes.chunks(8).position(foreign) {
                let found = &bytes[at * 8..][..8.min(bytes.len() - at * 8)];
                bail!("foreign data at {:#x}: {found:x?}", addr + at as u64 * 8);
            }
            addr += got as u64;
            left -= got as usize;
        }
        Ok(())
    }

    /// Accesses memory by plain loads and stores. If some of it is missing, the process dies here.
    fn touch(&mut self, map: Map) {
        for page in 0..map.pages.min(8) {
            if map.read(page) == 0 && self.rng.bool() {
                // SAFETY: Inside the mapping.
                unsafe { ptr::write_bytes(map.part(page, 1).addr, OWN, PAGE) };
            }
        }
    }

    fn step(&mut self) -> Result<()> {
        let (gives, call) = match self.rng.u8(..128) {
            0..28 => self.draw_mapping(),
            28..52 => self.draw_memory(),
            52..78 => self.draw_data(),
            78..104 => self.draw_file(),
            104..110 => self.draw_others(),
            110..114 => return self.io_uring(),
            114..117 => return self.userfault(),
            117 => return self.trace_child(),
            118 => return self.fork(),
            119 => match self.rng.u8(..8) {
                0 => exit(0),
                1 => {
                    let part = self.part();
                    self.touch(part);
                    return Ok(());
                }
                _ => (Gives::Nothing, NOTHING),
            },
            _ => {
                let part = self.part();
                return self.check_data(part.addr as u64, 16 * PAGE);
            }
        };
        let ret = self.call(call);
        if ret < 0 {
            return Ok(());
        }
        match gives {
            Gives::Nothing => Ok(()),
            Gives::Descriptor => {
                self.keep(ret as i32);
                Ok(())
            }
            Gives::Memory(len) => self.mapped(ret as u64, len),
            Gives::Errors => bail!("a call succeeded that must not: {call:x?}"),
        }
    }

    /// Keeps a new descriptor for further calls, if it is a file, a device or a pipe. Data from other
    /// kinds comes from the kernel, not from these processes.
    fn keep(&mut self, fd: i32) {
        // SAFETY: The kernel writes the result. The descriptor is new.
        let (stat, fd) = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            libc::fstat(fd, &mut stat);
            (stat, OwnedFd::from_raw_fd(fd))
        };
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFCHR | libc::S_IFIFO if self.fds.len() < FDS => {
                self.fds.push(fd)
            }
            libc::S_IFREG | libc::S_IFCHR | libc::S_IFIFO => {
                let old = self.rng.usize(..FDS);
                self.fds[old] = fd;
            }
            _ => {}
        }
    }

    /// Records new memory, checks its data, and uses some of it.
    fn mapped(&mut self, addr: u64, len: u64) -> Result<()> {
        let map = Map {
            addr: addr as *mut u8,
            pages: len.div_ceil(PAGE as u64) as usize,
        };
        let arena = self.arena.addr as u64;
        if !(arena..arena + (ARENA * PAGE) as u64).contains(&addr) {
            self.elsewhere.push_back(map);
        }
        self.check_data(addr, map.pages.min(64) * PAGE)?;
        if self.rng.u8(..8) == 0
            && self.call((libc::SYS_mprotect, [addr, len, RW as u64, 0, 0, 0])) == 0
        {
            self.touch(map);
        }
        if self.elsewhere.len() > 6 {
            if let Some(old) = self.elsewhere.pop_front() {
                // hugetlbfs mappings can only be unmapped in whole huge pages, even if fewer bytes were mapped.
                let whole = old.pages.next_multiple_of(HUGE);
                old.unmap().or_else(|_| {
                    Map {
                        pages: whole,
                        ..old
                    }
                    .unmap()
                })?;
            }
        }
        Ok(())
    }

    /// mmap, munmap, mremap.
    fn draw_mapping(&mut self) -> (Gives, Call) {
        let [addr, len] = self.range();
        match self.rng.u8(..28) {
            0..16 => {
                let place = match self.rng.u8(..8) {
                    0 => 0,
                    1 => libc::MAP_FIXED_NOREPLACE,
                    _ => libc::MAP_FIXED,
                };
                let prot = match self.rng.u8(..4) {
                    0 => self.some_bits(&[1, 2, 4, 8, 0x100_0000, 0x200_0000, 1 << 30]),
                    _ => RW as u64,
                };
                let kind = match self.rng.u8(..32) {
                    0 => 0,
                    1 => libc::MAP_DROPPABLE,
                    2 | 3 => libc::MAP_SHARED_VALIDATE,
                    4..9 => libc::MAP_PRIVATE,
                    _ => libc::MAP_SHARED,
                };
                let more = match self.rng.u8(..4) {
                    0 => self.some_bits(&[
                        libc::MAP_ANONYMOUS,
                        libc::MAP_GROWSDOWN,
                        libc::MAP_LOCKED,
                        libc::MAP_NORESERVE,
                        libc::MAP_POPULATE,
                        libc::MAP_NONBLOCK,
                        libc::MAP_STACK,
                        libc::MAP_HUGETLB,
                        libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
                        libc::MAP_SYNC,
                        libc::MAP_32BIT,
                        1 << 24,
                    ]),
                    _ => 0,
                };
                let flags = (place | kind) as u64 | more;
                (
                    Gives::Memory(len),
                    (
                        libc::SYS_mmap,
                        [addr, len, prot, flags, self.fd(), self.offset()],
                    ),
                )
            }
            16..21 => (Gives::Nothing, (libc::SYS_munmap, [addr, len, 0, 0, 0, 0])),
            _ => {
                let flags = self.pick(&[0, 1, 1, 3, 3, 3, 5, 7, 2, 4, 8]);
                let old = if self.rng.u8(..8) == 0 { 0 } else { len };
                let [to, new] = self.range();
                (
                    Gives::Memory(new),
                    (libc::SYS_mremap, [addr, old, new, flags, to, 0]),
                )
            }
        }
    }

    /// Calls on existing memory.
    fn draw_memory(&mut self) -> (Gives, Call) {
        let [addr, len] = self.range();
        let (number, [c, d, e, f]) = match self.rng.u8(..24) {
            0..3 => (
                libc::SYS_mprotect,
                [
                    self.some_bits(&[1, 2, 2, 4, 8, 0x100_0000, 0x200_0000]),
                    0,
                    0,
                    0,
                ],
            ),
            3..11 => {
                let advice = match self.rng.u8(..4) {
                    0 => 95 + self.rng.u64(..10),
                    _ => self.rng.u64(..28),
                };
                (libc::SYS_madvise, [advice, 0, 0, 0])
            }
            11 => (libc::SYS_mlock2, [self.rng.u64(..3), 0, 0, 0]),
            12 => (libc::SYS_munlock, [0; 4]),
            13 => (libc::SYS_msync, [self.rng.u64(..8), 0, 0, 0]),
            14 => (libc::SYS_mincore, [self.out(), 0, 0, 0]),
            15 => {
                let page = self.offset() / PAGE as u64;
                (libc::SYS_remap_file_pages, [0, page, 0, 0])
            }
            16 => {
                let nodes = self.rng.u64(..4);
                let nodes = self.words(0, &[nodes]);
                (
                    libc::SYS_mbind,
                    [self.rng.u64(..8), nodes, 64, self.rng.u64(..8)],
                )
            }
            17 if self.rng.u8(..8) == 0 => (libc::SYS_mseal, [0; 4]),
            _ => {
                let pid = self.peer();
                let [vectors, number] = self.vectors(0);
                let [theirs, more] = self.vectors(64);
                let call = self.pick(&[libc::SYS_process_vm_readv, libc::SYS_process_vm_writev]);
                return (
                    Gives::Nothing,
                    (call, [pid, vectors, number, theirs, more, 0]),
                );
            }
        };
        (Gives::Nothing, (number, [addr, len, c, d, e, f]))
    }

    /// Calls that move data.
    fn draw_data(&mut self) -> (Gives, Call) {
        let (fd, to) = (self.fd(), self.fd());
        let [addr, len] = self.data();
        let offset = self.offset();
        let call = match self.rng.u8(..18) {
            0 => (libc::SYS_read, [fd, addr, len, 0, 0, 0]),
            1 | 2 => (libc::SYS_write, [fd, addr, len, 0, 0, 0]),
            3 => (libc::SYS_pread64, [fd, addr, len, offset, 0, 0]),
            4 | 5 => (libc::SYS_pwrite64, [fd, addr, len, offset, 0, 0]),
            6 => {
                let [vectors, number] = self.vectors(0);
                (libc::SYS_readv, [fd, vectors, number, 0, 0, 0])
            }
            7 | 8 => {
                let number = self.pick(&[libc::SYS_preadv2, libc::SYS_pwritev2]);
                let flags = match self.rng.bool() {
                    true => 1 << self.rng.u64(..10),
                    false => 0,
                };
                let [vectors, count] = self.vectors(0);
                (number, [fd, vectors, count, offset, 0, flags])
            }
            9 => (libc::SYS_lseek, [fd, offset, self.rng.u64(..6), 0, 0, 0]),
            10 => (libc::SYS_sendfile, [to, fd, 0, len, 0, 0]),
            11 => {
                let at = self.words(0, &[offset]);
                (libc::SYS_sendfile, [to, fd, at, len, 0, 0])
            }
            12 => {
                let [from, into] = [self.words(0, &[offset]), self.words(1, &[offset ^ 0x3000])];
                (libc::SYS_copy_file_range, [fd, from, to, into, len, 0])
            }
            13 | 14 => {
                let from = self.words(0, &[offset]);
                let [from, into] = self.pick(&[[0, 0], [from, 0], [0, from], [from, from]]);
                (
                    libc::SYS_splice,
                    [fd, from, to, into, len, self.rng.u64(..16)],
                )
            }
            15 => (libc::SYS_tee, [fd, to, len, self.rng.u64(..16), 0, 0]),
            _ => {
                let [vectors, number] = self.vectors(0);
                (
                    libc::SYS_vmsplice,
                    [fd, vectors, number, self.rng.u64(..16), 0, 0],
                )
            }
        };
        (Gives::Nothing, call)
    }

    /// Calls on files.
    fn draw_file(&mut self) -> (Gives, Call) {
        let fd = self.fd();
        let (offset, out) = (self.offset(), self.out());
        let nothing = |call| (Gives::Nothing, call);
        match self.rng.u8(..33) {
            0..5 => self.draw_ioctl(fd),
            5..9 => self.draw_open(),
            9..12 => self.draw_fcntl(fd),
            12 | 13 => {
                let len = self.range()[1];
                let mode = self.pick(&[0, 1, 2, 3, 3, 3, 8, 16, 17, 32, 64, 128, 1 << 20]);
                nothing((libc::SYS_fallocate, [fd, mode, offset, len, 0, 0]))
            }
            14 => {
                let size = self.pick(&[offset, (ARENA * PAGE) as u64, (ARENA * PAGE) as u64]);
                nothing((libc::SYS_ftruncate, [fd, size, 0, 0, 0, 0]))
            }
            15 => {
                let call = self.pick(&[libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_syncfs]);
                nothing((call, [fd, 0, 0, 0, 0, 0]))
            }
            16 => {
                let call = self.pick(&[libc::SYS_fadvise64, libc::SYS_sync_file_range]);
                nothing((call, [fd, offset, 0x10000, self.rng.u64(..8), 0, 0]))
            }
            17 => nothing((
                libc::SYS_flock,
                [fd, self.pick(&[1, 2, 8]) | libc::LOCK_NB as u64, 0, 0, 0, 0],
            )),
            18 => {
                let empty = self.words(0, &[0]);
                nothing(self.pick(&[
                    (libc::SYS_fstat, [fd, out, 0, 0, 0, 0]),
                    (libc::SYS_fstatfs, [fd, out, 0, 0, 0, 0]),
                    (libc::SYS_statx, [fd, empty, AT_EMPTY_PATH, 0xfff, out, 0]),
                ]))
            }
            19 => {
                let mode = self.rng.u64(..0o10000);
                nothing(self.pick(&[
                    (libc::SYS_fchmod, [fd, mode, 0, 0, 0, 0]),
                    (libc::SYS_fchown, [fd, HOSTILE.into(), u64::MAX, 0, 0, 0]),
                    (libc::SYS_fchown, [fd, OTHER.into(), u64::MAX, 0, 0, 0]),
                ]))
            }
            20 => {
                let name = self.pick(&["user.a", "security.capability", "trusted.a", "a"]);
                let name = self.text(name);
                nothing(self.pick(&[
                    (libc::SYS_fsetxattr, [fd, name, out, 64, 0, 0]),
                    (libc::SYS_fgetxattr, [fd, name, out, 4096, 0, 0]),
                    (libc::SYS_flistxattr, [fd, out, 4096, 0, 0, 0]),
                    (libc::SYS_fremovexattr, [fd, name, 0, 0, 0, 0]),
                ]))
            }
            21 => {
                // A handle, and then an attempt to open it.
                let empty = self.words(0, &[0]);
                let handle = self.words(8, &[64]);
                let id = out;
                self.call((
                    libc::SYS_name_to_handle_at,
                    [fd, empty, handle, id, AT_EMPTY_PATH, 0],
                ));
                (
                    Gives::Errors,
                    (
                        libc::SYS_open_by_handle_at,
                        [fd, handle, libc::O_RDWR as u64, 0, 0, 0],
                    ),
                )
            }
            22 => {
                let place = self.text("/tmp");
                (
                    Gives::Errors,
                    self.pick(&[
                        (libc::SYS_mount, [place, place, 0, libc::MS_BIND, 0, 0]),
                        (libc::SYS_umount2, [place, 2, 0, 0, 0, 0]),
                        (libc::SYS_swapon, [place, 0, 0, 0, 0, 0]),
                        (libc::SYS_acct, [place, 0, 0, 0, 0, 0]),
                    ]),
                )
            }
            23 => {
                let event = self.words(0, &[0xffff_ffff, 0]);
                let polled = fd & 0xffff_ffff | (0xffff << 32);
                let polled = self.words(2, &[polled]);
                let epoll = self.call((libc::SYS_epoll_create1, [0; 6]));
                if epoll >= 0 {
                    self.call((libc::SYS_epoll_ctl, [epoll as u64, 1, fd, event, 0, 0]));
                    self.call((libc::SYS_epoll_wait, [epoll as u64, out, 8, 0, 0, 0]));
                    self.call((libc::SYS_close, [epoll as u64, 0, 0, 0, 0, 0]));
                }
                nothing((libc::SYS_poll, [polled, 1, 0, 0, 0, 0]))
            }
            24 => {
                let now = self.words(0, &[0, 0]);
                let fds = self.rng.u64(..);
                let fds = self.words(2, &[fds]);
                nothing((libc::SYS_select, [64, fds, 0, 0, now, 0]))
            }
            25 => {
                let path = self.text(&format!("/proc/self/fd/{fd}"));
                let inotify = self.call((
                    libc::SYS_inotify_init1,
                    [libc::O_NONBLOCK as u64, 0, 0, 0, 0, 0],
                ));
                if inotify >= 0 {
                    let inotify = inotify as u64;
                    self.call((libc::SYS_inotify_add_watch, [inotify, path, 0xfff, 0, 0, 0]));
                    let data = self.data();
                    self.call((libc::SYS_write, [fd, data[0], data[1], 0, 0, 0]));
                    self.call((libc::SYS_read, [inotify, out, 256, 0, 0, 0]));
                    self.call((libc::SYS_close, [inotify, 0, 0, 0, 0, 0]));
                }
                nothing(NOTHING)
            }
            26 => (Gives::Descriptor, (libc::SYS_dup, [fd, 0, 0, 0, 0, 0])),
            27..29 => {
                let name = self.text("memfd");
                (
                    Gives::Descriptor,
                    (libc::SYS_memfd_create, [name, 0, 0, 0, 0, 0]),
                )
            }
            29 => {
                if let Ok(fds) = pipe() {
                    fds.into_iter().for_each(|fd| self.keep(fd.into_raw_fd()));
                }
                nothing(NOTHING)
            }
            _ => {
                if !self.fds.is_empty() {
                    let old = self.rng.usize(..self.fds.len());
                    drop(self.fds.swap_remove(old));
                }
                nothing(NOTHING)
            }
        }
    }

    fn draw_ioctl(&mut self, fd: u64) -> (Gives, Call) {
        if self.rng.bool() {
            let command = match self.rng.bool() {
                true => self.rng.u64(..0x1_0000),
                false => self.rng.u64(..0x1_0000_0000),
            };
            let arg = match self.rng.bool() {
                true => self.out(),
                false => self.pick(&BAD),
            };
            return (
                Gives::Nothing,
                (libc::SYS_ioctl, [fd, command, arg, 0, 0, 0]),
            );
        }
        let flags = self.pick(&[0, 1, 1, 2, 1 << 32, u64::MAX]);
        let good = self.words(0, &[flags]);
        let [anywhere, _] = self.range();
        let end = self.scratch.addr as u64 + (self.scratch.pages * PAGE) as u64;
        let bad = self.pick(&BAD);
        let arg = self.pick(&[good, good, good, good + 1, anywhere, end - 4, bad]);
        (
            Gives::Descriptor,
            (libc::SYS_ioctl, [fd, DEVANON_IOC_NEW, arg, 0, 0, 0]),
        )
    }

    fn draw_open(&mut self) -> (Gives, Call) {
        // Does not wait for a lease to be broken, or for the other end of a pipe.
        let flags = self.pick(&[libc::O_RDWR, libc::O_RDWR, libc::O_RDONLY, libc::O_WRONLY]) as u64
            | libc::O_NONBLOCK as u64
            | self.some_bits(&[libc::O_PATH, libc::O_TRUNC, libc::O_APPEND, libc::O_DIRECT]);
        let own = self.fd() as i32;
        let pid = self.pid();
        let number = self.rng.u8(3..40);
        let part = self.part();
        let map = part.addr as u64;
        let end = map + (part.pages * PAGE) as u64;
        let (gives, path) = match self.rng.u8(..7) {
            0 | 1 => (Gives::Descriptor, DEVICE.to_owned()),
            2 | 3 => (Gives::Descriptor, format!("/proc/self/fd/{own}")),
            4 => (
                self.unless_witness(pid, Gives::Descriptor),
                format!("/proc/{pid}/fd/{number}"),
            ),
            // Only for privileged users.
            5 => (
                Gives::Errors,
                format!("/proc/self/map_files/{map:x}-{end:x}"),
            ),
            _ => {
                let secret = self.secret.addr as u64;
                let end = secret + (SECRET_PAGES * PAGE) as u64;
                let witness = self.shared.witness.load(Relaxed);
                let name = self.pick(&["mem", "maps", "environ", "pagemap", "fdinfo/3", "root"]);
                let path = match self.rng.bool() {
                    true => format!("/proc/{witness}/map_files/{secret:x}-{end:x}"),
                    false => format!("/proc/{witness}/{name}"),
                };
                (Gives::Errors, path)
            }
        };
        // With O_PATH, the open may succeed, as it gives no access.
        let flags = match gives {
            Gives::Errors => flags & !(libc::O_PATH as u64),
            _ => flags,
        };
        let path = self.text(&path);
        (
            gives,
            (
                libc::SYS_openat,
                [libc::AT_FDCWD as u64, path, flags, 0, 0, 0],
            ),
        )
    }

    fn draw_fcntl(&mut self, fd: u64) -> (Gives, Call) {
        const F_SET_RW_HINT: i32 = 1036;
        // A lock: type and whence, start, length.
        let lock = [
            self.rng.u64(..3) | (self.rng.u64(..3) << 16),
            self.offset(),
            self.range()[1],
            0,
        ];
        let lock = self.words(0, &lock);
        let hint = self.rng.u64(..8);
        let hint = self.words(8, &[hint]);
        let command = self.pick(&[
            libc::F_DUPFD,
            libc::F_DUPFD_CLOEXEC,
            libc::F_GETFL,
            libc::F_SETFL,
            libc::F_SETFD,
            libc::F_SETLK,
            libc::F_OFD_SETLK,
            libc::F_GETLK,
            libc::F_SETLEASE,
            libc::F_GETLEASE,
            libc::F_NOTIFY,
            libc::F_SETPIPE_SZ,
            libc::F_ADD_SEALS,
            libc::F_GET_SEALS,
            F_SET_RW_HINT,
            libc::F_SETOWN,
        ]);
        let (gives, arg) = match command {
            libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => (Gives::Descriptor, 3),
            libc::F_SETLK | libc::F_OFD_SETLK | libc::F_GETLK => (Gives::Nothing, lock),
            F_SET_RW_HINT => (Gives::Nothing, hint),
            libc::F_SETOWN => (Gives::Nothing, std::process::id().into()),
            libc::F_SETPIPE_SZ => (Gives::Nothing, self.pick(&[0, 4096, 0x2_0000, 1 << 40])),
            libc::F_SETFL => (
                Gives::Nothing,
                self.some_bits(&[
                    libc::O_APPEND,
                    libc::O_ASYNC,
                    libc::O_DIRECT,
                    libc::O_NOATIME,
                ]) | self.pick(&[0, libc::O_NONBLOCK as u64, libc::O_NONBLOCK as u64]),
            ),
            _ => (Gives::Nothing, self.rng.u64(..64)),
        };
        (gives, (libc::SYS_fcntl, [fd, command as u64, arg, 0, 0, 0]))
    }

    /// Calls on other processes: those of the same user, and the witness.
    fn draw_others(&mut self) -> (Gives, Call) {
        let pid = self.pid();
        let witness = self.shared.witness.load(Relaxed) as u64;
        if self.rng.u8(..16) == 0 && pid > 1 && pid != witness {
            return (
                Gives::Nothing,
                (libc::SYS_kill, [pid, libc::SIGTERM as u64, 0, 0, 0, 0]),
            );
        }
        // SAFETY: The descriptor is new.
        let pidfd = match self.call((libc::SYS_pidfd_open, [pid, 0, 0, 0, 0, 0])) {
            fd @ 0.. => unsafe { OwnedFd::from_raw_fd(fd as i32) },
            _ => return (Gives::Nothing, NOTHING),
        };
        let fd = pidfd.as_raw_fd() as u64;
        self.pidfd = Some(pidfd);
        let [vectors, number] = self.vectors(0);
        let theirs = self.words(66, &[self.secret.addr as u64, PAGE as u64]);
        let ours = self.words(64, &[self.out(), PAGE as u64]);
        let secret = self.words(68, &[self.secret.addr as u64]);
        let advice = self.pick(&[3, 4, 20, 21, 25]);
        let stolen = self.rng.u64(3..40);
        match self.rng.u8(..5) {
            0 => (
                self.unless_witness(pid, Gives::Nothing),
                (
                    libc::SYS_process_madvise,
                    [fd, vectors, number, advice, 0, 0],
                ),
            ),
            1 => (
                self.unless_witness(pid, Gives::Descriptor),
                (libc::SYS_pidfd_getfd, [fd, stolen, 0, 0, 0, 0]),
            ),
            2 => {
                let call = self.pick(&[libc::SYS_process_vm_readv, libc::SYS_process_vm_writev]);
                (Gives::Errors, (call, [witness, ours, 1, theirs, 1, 0]))
            }
            3 => (
                Gives::Errors,
                (
                    libc::SYS_ptrace,
                    [libc::PTRACE_SEIZE.into(), witness, 0, 0, 0, 0],
                ),
            ),
            _ => {
                let out = self.out();
                (
                    Gives::Errors,
                    (libc::SYS_move_pages, [witness, 1, secret, 0, out, 0]),
                )
            }
        }
    }

    /// Submits one io_uring entry, or registers buffers.
    fn io_uring(&mut self) -> Result<()> {
        let Some(ring) = self.ring.take() else {
            self.ring = Ring::new().ok();
            return Ok(());
        };
        while ring.next().is_some() {}
        let wait = u32::from(self.rng.bool());
        // None of these calls has to succeed.
        match self.rng.u8(..16) {
            0 => return Ok(()),
            1 => drop(ring.register(&[])),
            2 | 3 => {
                let [addr, len] = self.range();
                let buffer = libc::iovec {
                    iov_base: addr as *mut _,
                    iov_len: len as usize,
                };
                let _ = ring.register(&[]).and_then(|()| ring.register(&[buffer]));
                self.pinned = [addr, len];
            }
            _ => {
                let (fd, other, [addr, len]) = (self.fd(), self.fd(), self.data());
                let offset = match self.rng.bool() {
                    true => u64::MAX,
                    false => self.offset(),
                };
                // READ_FIXED, WRITE_FIXED, FALLOCATE, READ, WRITE, MADVISE, SPLICE, TEE
                let code = self.pick(&[4, 4, 4, 5, 5, 5, 17, 22, 23, 25, 30, 33]);
                // Sometimes IOSQE_ASYNC, so that an io_uring worker executes it.
                let flags = self.pick(&[0, 0, 1 << 4]);
                let more = match code {
                    25 => self.pick(&[4, 9, 20, 21]) << 32,
                    _ => 0,
                };
                // For MADVISE, the offset is the length. Too long a length would affect the whole process.
                let (addr, offset) = match code {
                    25 => self.range().into(),
                    _ => (addr, offset),
                };
                let (addr, len, index) = match code {
                    17 => (len, self.pick(&[0, 1, 3]), 0),
                    30 | 33 => (u64::MAX, len, other << 32),
                    4 | 5 if self.rng.u8(..8) > 0 => (self.pinned[0], self.pinned[1], 0),
                    _ => (addr, len, 0),
                };
                let first = code | (flags << 8) | (fd << 32);
                let entry = [
                    first,
                    offset,
                    addr,
                    len & 0xffff_ffff | more,
                    0,
                    index,
                    0,
                    0,
                ];
                let _ = ring.submit(entry).and_then(|()| ring.enter(0, wait));
            }
        }
        self.ring = Some(ring);
        Ok(())
    }

    /// userfaultfd(2) with UFFD_FEATURE_SIGBUS, so that no fault waits for this process.
    fn userfault(&mut self) -> Result<()> {
        const USER_MODE_ONLY: u64 = 1;
        const UFFDIO_API: u64 = 0xc018_aa3f;
        const SIGBUS: u64 = 1 << 7;
        let Some(fd) = self.userfaultfd else {
            let flags = USER_MODE_ONLY | libc::O_NONBLOCK as u64;
            let fd = self.call((libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]));
            let more = self.pick(&[0, 1 << 5, 1 << 10, (1 << 5) | (1 << 10), 1 << 12]);
            let api = self.words(0, &[0xaa, SIGBUS | more, 0]);
            if fd < 0 {
                return Ok(());
            }
            if self.call((libc::SYS_ioctl, [fd as u64, UFFDIO_API, api, 0, 0, 0])) < 0 {
                self.call((libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]));
            } else {
                self.userfaultfd = Some(fd as i32);
            }
            return Ok(());
        };
        if self.rng.u8(..16) == 0 {
            self.userfaultfd = None;
            self.call((libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]));
            return Ok(());
        }
        let (number, words) = self.pick(&UFFDIO);
        let ([addr, len], [from, _]) = (self.range(), self.range());
        let mode = self.rng.u64(..8);
        let arg = match words {
            4 => [addr, from, len, mode & 1],
            _ => [addr, len, mode, 0],
        };
        let arg = self.words(0, &arg);
        self.call((libc::SYS_ioctl, [fd as u64, number, arg, 0, 0, 0]));
        Ok(())
    }

    /// Reads and writes the arena of a traced child, as a debugger does.
    ///
    /// The child also tries to execute a file, which must fail for each of them. This process does not
    /// try that itself: by its source, Linux 7.3 may hang (in `mm_get_cid()`) if exec fails in a process
    /// that once had more threads than there are CPUs and then gets threads again, such as io_uring's
    /// workers.
    fn trace_child(&mut self) -> Result<()> {
        let parent = std::process::id();
        let fd = self.fd();
        let (empty, none) = (self.words(0, &[0]), self.words(1, &[0]));
        // SAFETY: Single-threaded; the child stops at once, and dies with its parent.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: No memory involved.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::getppid() as u32 == parent {
                    libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                    libc::syscall(libc::SYS_execveat, fd, empty, none, none, AT_EMPTY_PATH);
                    libc::raise(libc::SIGSTOP);
                }
            }
            exit(0);
        }
        if pid < 0 {
            return Ok(());
        }
        let wait = |flags| {
            let mut status = 0;
            // SAFETY: The kernel writes the status. The timer may interrupt the call.
            while unsafe { libc::waitpid(pid, &mut status, flags) } < 0 {}
            status
        };
        let status = wait(libc::WUNTRACED);
        ensure!(
            libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGSTOP,
            "descriptor {fd} was executed: status {status:#x}"
        );
        for _ in 0..8 {
            let [addr, _] = self.data();
            let number = self.pick(&[libc::PTRACE_POKEDATA, libc::PTRACE_PEEKDATA]);
            // The system call stores the peeked word at `out()`, in the scratch pages.
            let value = match number {
                libc::PTRACE_POKEDATA => OWN_WORD,
                _ => self.out(),
            };
            if self.call((
                libc::SYS_ptrace,
                [number.into(), pid as u64, addr, value, 0, 0],
            )) == 0
            {
                self.check_data(addr, 8)?;
            }
        }
        // SAFETY: Our own child.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        wait(0);
        Ok(())
    }

    /// Creates another process like this one, with the same parent.
    fn fork(&mut self) -> Result<()> {
        let flags = (libc::CLONE_PARENT | libc::SIGCHLD) as u64;
        self.shared.alive.fetch_add(1, Relaxed);
        match self.call((libc::SYS_clone, [flags, 0, 0, 0, 0, 0])) {
            0 => self.set_up(),
            1.. => Ok(()),
            _ => {
                self.shared.alive.fetch_sub(1, Relaxed);
                Ok(())
            }
        }
    }

    /// Setup that every process does for itself.
    fn set_up(&mut self) -> Result<()> {
        let number = self.shared.processes.fetch_add(1, Relaxed);
        self.rng = fastrand::Rng::with_seed(self.rng.u64(..) ^ number);
        self.shared.pids[number as usize % 16].store(std::process::id() as i32, Relaxed);
        // It belongs to the parent.
        self.ring = None;
        // Repeatedly interrupts every wait.
        let period = libc::timeval {
            tv_sec: 0,
            tv_usec: 200_000,
        };
        let timer = libc::itimerval {
            it_interval: period,
            it_value: period,
        };
        // SAFETY: The kernel reads the timer, and does not return the old one.
        cvt(unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, ptr::null_mut()) })?;
        Ok(())
    }
}

fn exit(status: i32) -> ! {
    // SAFETY: Ends this process.
    unsafe { libc::_exit(status) }
}

/// A process that makes calls until all processes together have made `calls`.
fn run(
    shared: &Shared,
    seed: u64,
    calls: u64,
    arena: Map,
    secret: Map,
    fds: &[OwnedFd],
) -> Result<()> {
    extern "C" fn interrupt(_: i32) {}
    let handler: extern "C" fn(i32) = interrupt;
    become_user(HOSTILE)?;
    // SAFETY: The handler does nothing. Calls that it interrupts are not restarted.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        cvt(libc::sigaction(libc::SIGALRM, &action, ptr::null_mut()))?;
        for signal in [libc::SIGPIPE, libc::SIGXFSZ, libc::SIGIO] {
            libc::signal(signal, libc::SIG_IGN);
        }
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
    let mut own = fds
        .iter()
        .map(OwnedFd::try_clone)
        .collect::<std::io::Result<Vec<_>>>()?;
    own.extend([device()?, ioctl_file(ARENA)?, memfd(ARENA)?]);
    own.extend(pipe()?);
    // Initially something is mapped everywhere.
    for (index, fd) in own[..5].iter().enumerate() {
        arena.part(index * 10, 10).cover(fd, index * 10)?;
    }
    arena.part(50, ARENA - 50).cover(&own[1], 50)?;
    let scratch = Map::reserve(17)?.cover_anonymous()?;
    for (what, most) in LIMITS {
        let limit = libc::rlimit {
            rlim_cur: most,
            rlim_max: most,
        };
        // SAFETY: The kernel reads the limit.
        cvt(unsafe { libc::setrlimit(what, &limit) })?;
    }
    let mut process = Process {
        rng: fastrand::Rng::with_seed(seed),
        shared,
        arena,
        secret,
        fds: own,
        elsewhere: VecDeque::new(),
        scratch,
        ring: None,
        pinned: [0; 2],
        userfaultfd: None,
        pidfd: None,
        history: VecDeque::new(),
    };
    process.set_up()?;
    while shared.calls.fetch_add(1, Relaxed) < calls {
        if let Err(err) = process.step() {
            let calls: Vec<_> = process
                .history
                .iter()
                .map(|(call, ret)| format!("# call {call:x?}: {ret}\n"))
                .collect();
            bail!("{err:#}, after\n{}", calls.concat());
        }
    }
    Ok(())
}

/// Keeps processes running until all calls were made. This process has no other children.
fn keep_running(shared: &Shared, calls: u64, spawn: impl Fn() -> Result<()>) -> Result<()> {
    let (mut faults, mut exited) = (0, 0);
    loop {
        while shared.calls.load(Relaxed) < calls && shared.alive.load(Relaxed) < PROCESSES {
            shared.alive.fetch_add(1, Relaxed);
            drop(fork(|_| spawn())?);
        }
        let mut status = 0;
        // SAFETY: The kernel writes the status.
        match cvt(unsafe { libc::waitpid(-1, &mut status, 0) }) {
            Ok(_) => exited += 1,
            Err(err) if err.raw_os_error() != Some(libc::ECHILD) => return Err(err.into()),
            Err(_) if shared.calls.load(Relaxed) < calls => {
                // A process was killed after it had counted a child that it was about to fork.
                shared.alive.store(0, Relaxed);
                continue;
            }
            Err(_) => break,
        }
        shared.alive.fetch_sub(1, Relaxed);
        match (libc::WIFSIGNALED(status), libc::WTERMSIG(status)) {
            (true, libc::SIGSEGV | libc::SIGBUS) => faults += 1,
            (true, libc::SIGTERM) => {}
            (true, signal) => bail!("a process was killed by signal {signal}"),
            (false, _) => ensure!(status == 0, "a process failed: status {status:#x}"),
        }
    }
    println!("{exited} processes, {faults} of them killed by their own access");
    Ok(())
}

/// Fills memory with secrets, and checks that they stay unchanged and that new pages are zero.
fn witness(shared: &Shared, place: Map, seed: u64) -> Result<()> {
    become_user(OTHER)?;
    let mut rng = fastrand::Rng::with_seed(seed);
    let half = SECRET_PAGES / 2;
    let objects = [
        (device()?, place.part(0, half)),
        (ioctl_file(half)?, place.part(half, half)),
    ];
    let words = |map: Map| {
        (0..map.pages).flat_map(move |page| (0..PAGE / 8).map(move |at| map.word(page, at)))
    };
    let fill = |map: Map| {
        // SAFETY: Inside a mapping of this process.
        words(map).for_each(|word| unsafe { word.write_volatile(SECRET) });
    };
    let check = |map: Map| {
        // SAFETY: As above.
        match words(map)
            .map(|word| unsafe { word.read_volatile() })
            .find(|word| *word != SECRET)
        {
            Some(found) => bail!("another user's page was changed to {found:#x}"),
            None => Ok(()),
        }
    };
    for (fd, map) in &objects {
        fill(map.cover(fd, 0)?);
    }
    while !shared.stop_witness.load(Relaxed) {
        let (fd, map) = &objects[rng.usize(..2)];
        let page = rng.usize(..half);
        let part = map.part(page, rng.usize(1..=8.min(half - page)));
        check(part)?;
        if rng.u8(..4) == 0 {
            // It need not succeed.
            let _ = part.advise(libc::MADV_PAGEOUT);
        } else {
            // Frees the pages, and gets new ones.
            part.cover_anonymous()?;
            std::thread::yield_now();
            part.cover(fd, page)?.check_zero()?;
            fill(part);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    for (_, map) in &objects {
        check(*map)?;
    }
    Ok(())
}

/// Resource usage of the whole machine.
#[derive(Debug)]
struct Usage {
    module: usize,
    files: usize,
    shmem: usize,
}

impl Usage {
    fn now() -> Result<Self> {
        let files = fs::read_to_string("/proc/sys/fs/file-nr")?;
        let files = files
            .split_whitespace()
            .next()
            .context("file-nr")?
            .parse()?;
        Ok(Self {
            module: module_refs()?,
            files,
            shmem: meminfo("Shmem")?,
        })
    }

    /// Waits until usage is back to this: the kernel frees some things a little later.
    fn wait_for(&self) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let now = Self::now()?;
            if now.module <= self.module && now.files <= self.files && now.shmem <= self.shmem + 64
            {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "not freed: {now:?}, before {self:?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Zeroed memory for the shared state.
fn shared() -> Result<&'static Shared> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let map = Map::new(ptr::null_mut(), 1, RW, flags, -1, 0)?;
    // SAFETY: A page that nobody unmaps; all zero is a valid value, and every field is atomic.
    Ok(unsafe { &*map.addr.cast() })
}

fn round(seed: u64, calls: u64, huge: bool) -> Result<()> {
    // Before the baseline is taken, as shared memory takes a file as well.
    let shared = shared()?;
    let before = Usage::now()?;
    let secret = Map::reserve(SECRET_PAGES)?;
    let arena = Map {
        addr: PLACE as *mut u8,
        pages: ARENA,
    };

    let witness = fork(|_| witness(shared, secret, seed))?;
    shared.witness.store(witness.pid, Relaxed);
    // SAFETY: No memory involved.
    cvt(unsafe { libc::seteuid(HOSTILE) })?;
    let common = device().and_then(|dev| Ok([dev, ioctl_file(ARENA)?]));
    // SAFETY: As above.
    cvt(unsafe { libc::seteuid(0) })?;
    let common = common?;

    let keeper = fork(|_| {
        keep_running(shared, calls, || {
            let number = shared.processes.load(Relaxed);
            run(shared, seed ^ (number << 32), calls, arena, secret, &common)
        })
    })?;
    let result = keeper.join();
    shared.stop_witness.store(true, Relaxed);
    witness.join().context("the witness")?;
    result?;

    if !huge {
        expect_resident(&common[0], 0, "all unmapped")?;
    }
    drop(common);
    secret.unmap()?;
    before.wait_for()
}

/// Makes `calls` calls, drawn with `seed`; half of them with huge pages enabled.
pub fn random_calls(seed: u64, calls: u64) -> Result<()> {
    for (huge, word) in [(false, "never"), (true, "advise")] {
        fs::write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", word)?;
        round(seed, calls / 2, huge)
            .with_context(|| format!("huge pages {word}; --seed {seed}"))?;
    }
    count("operations", calls);
    Ok(())
}
