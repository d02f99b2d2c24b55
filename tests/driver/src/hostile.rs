// SPDX-License-Identifier: GPL-2.0

//! A malicious unprivileged user, who attacks the kernel, the memory of others, and his own.
//!
//! These tests make every call he may make on the device, its ioctl and its files: at random in
//! [`random_calls`], and with a purpose in the tests below.

use crate::sys::*;
use anyhow::{Context, Result, bail, ensure};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering::*};
use std::{env, fs, io, ptr};

mod random;
pub use random::random_calls;

/// The malicious user, and another one.
const HOSTILE: u32 = 1000;
const OTHER: u32 = 1001;

const TAG: u64 = 0x4057_11e0_0000_0000;

/// Turns this process into one of an unprivileged user.
fn become_user(uid: u32) -> Result<()> {
    // SAFETY: No memory involved; the group list is empty.
    unsafe {
        cvt(libc::setgroups(0, ptr::null()))?;
        cvt(libc::setgid(uid))?;
        cvt(libc::setuid(uid))?;
        // A process that changed its user is accessible only to root, not even to the same user.
        cvt(libc::prctl(libc::PR_SET_DUMPABLE, 1))?;
        // Yama denies access to processes of the same user as well. Fails without Yama.
        libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY);
    }
    Ok(env::set_current_dir("/tmp")?)
}

/// Runs `body` in a process of an unprivileged user.
fn as_user(uid: u32, body: impl FnOnce(&mut Peer) -> Result<()>) -> Result<Peer> {
    fork(|peer| {
        become_user(uid)?;
        body(peer)
    })
}

fn pipe() -> Result<[OwnedFd; 2]> {
    let mut fds = [0; 2];
    // SAFETY: The kernel writes two descriptors, which are new.
    unsafe {
        cvt(libc::pipe2(
            fds.as_mut_ptr(),
            libc::O_CLOEXEC | libc::O_NONBLOCK,
        ))?;
        Ok(fds.map(|fd| OwnedFd::from_raw_fd(fd)))
    }
}

fn iovec(map: Map) -> libc::iovec {
    libc::iovec {
        iov_base: map.addr.cast(),
        iov_len: map.pages * PAGE,
    }
}

/// Fails unless all bytes of `map` were moved.
fn expect_all_moved(what: &str, map: Map, moved: isize) -> Result<()> {
    let bytes = cvt(moved as i32).with_context(|| what.to_owned())?;
    ensure!(
        bytes as usize == map.pages * PAGE,
        "{what}: {bytes} bytes of {} pages",
        map.pages
    );
    Ok(())
}

fn write_all(fd: &OwnedFd, map: Map) -> Result<()> {
    // SAFETY: The test's own mapping.
    expect_all_moved("write", map, unsafe {
        libc::write(fd.as_raw_fd(), map.addr.cast(), map.pages * PAGE)
    })
}

fn read_all(fd: &OwnedFd, map: Map) -> Result<()> {
    // SAFETY: As above.
    expect_all_moved("read", map, unsafe {
        libc::read(fd.as_raw_fd(), map.addr.cast(), map.pages * PAGE)
    })
}

/// Private memory to read into and write from.
fn buffer(pages: usize) -> Result<Map> {
    Map::reserve(pages)?.cover_anonymous()
}

/// Calls an ioctl through one of the kernel's entry points. Returns 0 or the descriptor.
type Ioctl = fn(&OwnedFd, u32, *mut DevanonNew) -> io::Result<i32>;

fn ioctl(fd: &OwnedFd, cmd: u32, arg: *mut DevanonNew) -> io::Result<i32> {
    // SAFETY: The kernel checks the pointer, and nobody else uses the memory it may write.
    cvt(unsafe { libc::ioctl(fd.as_raw_fd(), cmd.into(), arg) })
}

/// The ioctl as called by a 32-bit program.
fn ioctl_32(fd: &OwnedFd, cmd: u32, arg: *mut DevanonNew) -> io::Result<i32> {
    const IOCTL_32: u64 = 54;
    let ret: u64;
    // SAFETY: As above. `rbx` is reserved by the compiler, and restored; the kernel clobbers r8-r11.
    unsafe {
        std::arch::asm!(
            "xchg {fd}, rbx",
            "int 0x80",
            "xchg {fd}, rbx",
            fd = inout(reg) fd.as_raw_fd() as u64 => _,
            inout("rax") IOCTL_32 => ret,
            in("rcx") u64::from(cmd),
            in("rdx") arg,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    let ret = ret as i32;
    if ret < 0 {
        Err(io::Error::from_raw_os_error(-ret))
    } else {
        Ok(ret)
    }
}

/// The driver knows a single ioctl number. For all others it returns what a device without ioctls
/// returns.
fn check_ioctl_numbers(seed: u64, ioctl: Ioctl) -> Result<()> {
    let mut rng = fastrand::Rng::with_seed(seed);
    // Within reach of a 32-bit program, and followed by an unmapped page.
    let low = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    let page = Map::new(ptr::null_mut(), 2, RW, low, -1, 0)?.part(0, 1);
    page.part(0, 1).protect(RW)?;
    Map {
        addr: page.addr.wrapping_add(PAGE),
        pages: 1,
    }
    .unmap()?;
    let arg: *mut DevanonNew = page.addr.cast();
    let dev = device()?;
    let file = ioctl_file(1)?;
    let null = open("/dev/null", libc::O_RDWR)?;
    let mut calls = 0;
    let mut call = |fd: &OwnedFd, cmd| {
        calls += 1;
        page.write(0, 0);
        match ioctl(fd, cmd, arg) {
            Ok(_) => 0,
            Err(err) => err.raw_os_error().unwrap_or(0),
        }
    };

    for number in 0..256 {
        for direction in 0..4 {
            for size in [0, 1, 4, 7, 8, 9, 16, 0x1000, 0x3fff] {
                let cmd = (direction << 30) | (size << 16) | (0xda << 8) | number;
                let ours = cmd as libc::c_ulong == DEVANON_IOC_NEW;
                for (fd, expected) in [
                    (&dev, if ours { 0 } else { libc::ENOTTY }),
                    (&file, libc::ENOTTY),
                ] {
                    let found = call(fd, cmd);
                    ensure!(found == expected, "{cmd:#x}: {found}, expected {expected}");
                }
            }
        }
    }
    // Every type and number. The kernel handles a few itself, for any device.
    for low in 0..=u16::MAX {
        let high = if rng.bool() { 0 } else { rng.u32(..) << 16 };
        let cmd = high | u32::from(low);
        if cmd as libc::c_ulong == DEVANON_IOC_NEW {
            continue;
        }
        let (found, expected) = (call(&dev, cmd), call(&null, cmd));
        ensure!(
            found == expected,
            "{cmd:#x}: {found}, expected {expected} as with /dev/null"
        );
    }

    let cmd = DEVANON_IOC_NEW as u32;
    let before = fs::read_dir("/proc/self/fd")?.count();
    for addr in [
        0,
        1,
        arg as usize + PAGE - 4,
        arg as usize + PAGE,
        0xffff_f000,
    ] {
        page.write(0, 0);
        expect_errno(
            &format!("{addr:#x}"),
            ioctl(&dev, cmd, addr as *mut DevanonNew),
            libc::EFAULT,
        )?;
    }
    ensure!(
        fs::read_dir("/proc/self/fd")?.count() == before,
        "a descriptor was leaked"
    );
    page.write(0, DEVANON_CLOEXEC.into());
    let fd = ioctl(&dev, cmd, arg).context("DEVANON_IOC_NEW")?;
    // SAFETY: The descriptor is new.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    truncate(&file, 4 * PAGE)?;
    Map::shared(&file, 4, 0)?.fill(TAG);
    expect_resident(&file, 4, "touched")?;
    count("operations", calls);
    Ok(())
}

pub fn ioctl_numbers(seed: u64) -> Result<()> {
    as_user(HOSTILE, |_| check_ioctl_numbers(seed, ioctl))?
        .join()
        .with_context(|| format!("--seed {seed} replays it"))
}

pub fn ioctl_numbers_of_32_bit_programs(seed: u64) -> Result<()> {
    let probe = fork(|_| {
        let _ = ioctl_32(&device()?, 0, ptr::null_mut());
        Ok(())
    })?;
    if libc::WIFSIGNALED(wait(probe.pid)?) {
        return skip("this kernel has no 32-bit system calls");
    }
    as_user(HOSTILE, |_| check_ioctl_numbers(seed, ioctl_32))?
        .join()
        .with_context(|| format!("--seed {seed} replays it"))
}

/// A user's own processes may reopen his objects and access his memory. Another user's processes may
/// not, in any way.
pub fn closed_to_other_users() -> Result<()> {
    let place = Map::reserve(4)?;
    let mut owner = as_user(HOSTILE, |peer| {
        // Fixed numbers, no matter what else is open.
        let (dev, file) = (device()?, ioctl_file(4)?);
        for (fd, number) in [(&dev, 100), (&file, 101)] {
            // SAFETY: No memory involved.
            cvt(unsafe { libc::dup2(fd.as_raw_fd(), number) })?;
        }
        let map = place.cover(&file, 0)?;
        map.fill(TAG);
        peer.meet()?;
        peer.meet()?;
        ensure!(
            map.read(0) == TAG + 1,
            "not written by the user's other process"
        );
        map.part(1, 3).check(TAG + 1)?;
        map.unmap()?;
        expect_resident(&file, 0, "unmapped")
    })?;
    owner.meet()?;
    let pid = owner.pid;

    as_user(OTHER, |_| {
        for (what, result) in ways_in(pid, place)? {
            match result {
                Ok(_) => bail!("{what} of another user succeeded"),
                Err(err) => ensure!(
                    matches!(err.raw_os_error(), Some(libc::EPERM | libc::EACCES)),
                    "{what} of another user: {err}"
                ),
            }
        }
        Ok(())
    })?
    .join()?;
    as_user(HOSTILE, |_| {
        for (what, result) in ways_in(pid, place)? {
            // Only privileged users may do this, even to their own processes.
            if what.contains("map_files") || what == "process_madvise" {
                expect_errno(&what, result, libc::EPERM)?;
            } else {
                result.with_context(|| format!("{what} of the same user"))?;
            }
        }
        // Reopening the device creates a new open with its own memory.
        let dev = open(&format!("/proc/{pid}/fd/100"), libc::O_RDWR)?;
        Map::shared(&dev, 4, 0)?.check_zero()?;
        // Reopening the ioctl's file gives the same memory.
        let file = open(&format!("/proc/{pid}/fd/101"), libc::O_RDWR)?;
        let map = Map::shared(&file, 4, 0)?;
        map.check(TAG)?;
        map.write(0, TAG + 1);
        Ok(())
    })?
    .join()?;

    // Root may open the owner's mapping, which does not change what the owner has.
    let start = place.addr as usize;
    let path = format!(
        "/proc/{pid}/map_files/{start:x}-{:x}",
        start + place.pages * PAGE
    );
    let file = open(&path, libc::O_RDWR).context("map_files, as root")?;
    let map = Map::shared(&file, 4, 0)?;
    map.part(1, 3).check(TAG + 1)?;
    map.unmap()?;
    drop(file);
    owner.meet()?;
    owner.join()
}

/// Tries all ways to access process `pid`: its descriptors 100 and 101, and its memory at `place`.
fn ways_in(pid: i32, place: Map) -> Result<Vec<(String, io::Result<i32>)>> {
    let start = place.addr as usize;
    let range = format!("{start:x}-{:x}", start + place.pages * PAGE);
    let mut ways: Vec<_> = [
        "fd/100".to_owned(),
        "fd/101".to_owned(),
        "mem".to_owned(),
        format!("map_files/{range}"),
    ]
    .into_iter()
    .map(|name| {
        let opened = open(&format!("/proc/{pid}/{name}"), libc::O_RDWR);
        (name, opened.map(|_| 0))
    })
    .collect();

    let word = buffer(1)?;
    let ours = iovec(word);
    let theirs = iovec(place.part(1, 1));
    // SAFETY: Words and pages of the test; new descriptors; the other process is only stopped for a
    // moment.
    unsafe {
        let read = libc::process_vm_readv(pid, &ours, 1, &theirs, 1, 0);
        ways.push(("process_vm_readv".into(), cvt(read as i32)));
        // If the read succeeded, writes back the same data.
        let write = libc::process_vm_writev(pid, &ours, 1, &theirs, 1, 0);
        ways.push(("process_vm_writev".into(), cvt(write as i32)));
        let seize = libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0);
        ways.push(("ptrace".into(), cvt(seize as i32)));
        if seize == 0 {
            cvt(libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0) as i32)?;
            wait(pid)?;
            cvt(libc::ptrace(libc::PTRACE_DETACH, pid, 0, 0) as i32)?;
        }
        let pidfd = OwnedFd::from_raw_fd(cvt(libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32)?);
        let stolen = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), 101, 0) as i32;
        if stolen >= 0 {
            drop(OwnedFd::from_raw_fd(stolen));
        }
        ways.push(("pidfd_getfd".into(), cvt(stolen)));
        let advised = libc::syscall(
            libc::SYS_process_madvise,
            pidfd.as_raw_fd(),
            &theirs,
            1,
            libc::MADV_COLD,
            0,
        );
        ways.push(("process_madvise".into(), cvt(advised as i32)));
    }
    Ok(ways)
}

/// Pages that are in a pipe when their last mapping goes away stay there unchanged until they are
/// read. The object loses them at once, and no other object gets them.
pub fn pages_in_a_pipe() -> Result<()> {
    type Put = fn(&OwnedFd, Map, &OwnedFd) -> isize;
    let vmsplice: Put = |_, map, to| {
        // SAFETY: One vector, of the test's own mapping.
        unsafe { libc::vmsplice(to.as_raw_fd(), &iovec(map), 1, 0) }
    };
    let gift: Put = |_, map, to| {
        // SAFETY: As above.
        unsafe { libc::vmsplice(to.as_raw_fd(), &iovec(map), 1, libc::SPLICE_F_GIFT) }
    };
    let splice: Put = |fd, map, to| {
        let (len, flags) = (map.pages * PAGE, libc::SPLICE_F_MOVE);
        // SAFETY: The kernel writes the offset.
        unsafe {
            libc::splice(
                fd.as_raw_fd(),
                &mut 0,
                to.as_raw_fd(),
                ptr::null_mut(),
                len,
                flags,
            )
        }
    };
    let sendfile: Put = |fd, map, to| {
        // SAFETY: As above.
        unsafe { libc::sendfile(to.as_raw_fd(), fd.as_raw_fd(), &mut 0, map.pages * PAGE) }
    };

    as_user(HOSTILE, |_| {
        const PAGES: usize = 8;
        let (dev, file) = (device()?, ioctl_file(PAGES)?);
        let found = buffer(PAGES)?;
        for (what, fd, put) in [
            ("vmsplice", &dev, vmsplice),
            ("vmsplice, a gift", &dev, gift),
            ("vmsplice of a file", &file, vmsplice),
            ("splice", &file, splice),
            ("sendfile", &file, sendfile),
        ] {
            let [from, to] = pipe()?;
            let [from_tee, to_tee] = pipe()?;
            let map = Map::shared(fd, PAGES, 0)?;
            map.fill(TAG);
            expect_all_moved(what, map, put(fd, map, &to))?;
            // SAFETY: No memory involved.
            expect_all_moved("tee", map, unsafe {
                libc::tee(from.as_raw_fd(), to_tee.as_raw_fd(), PAGES * PAGE, 0)
            })?;
            map.unmap()?;
            expect_resident(fd, 0, what)?;

            // Newly allocated pages must be different ones.
            let other = Map::shared(&device()?, 1024, 0)?;
            other.check_zero()?;
            other.fill(1);
            let again = Map::shared(fd, PAGES, 0)?;
            again.check_zero()?;
            again.fill(2);
            for from in [from, from_tee] {
                found.fill(0);
                read_all(&from, found)?;
                found.check(TAG).context(what)?;
            }
            other.check(1)?;
            again.check(2)?;
            other.unmap()?;
            again.unmap()?;
            expect_resident(fd, 0, what)?;
        }

        // The device itself cannot be read, and splice(2) does not change that.
        let [_from, to] = pipe()?;
        let spliced = splice(&dev, found, &to) as i32;
        expect_errno("splice from the device", cvt(spliced), libc::EINVAL)
    })?
    .join()
}

/// An io_uring of a few entries.
struct Ring {
    fd: OwnedFd,
    /// Heads, tails and completions; then the submissions.
    shared: [Map; 2],
    /// Offsets within the first, in bytes.
    submitted: u32,
    taken: u32,
    completed: u32,
    completions: u32,
}

const IORING_OP_READ_FIXED: u8 = 4;
const IORING_OP_WRITE_FIXED: u8 = 5;
const IORING_OP_READ: u8 = 22;

impl Ring {
    const ENTRIES: u32 = 8;

    fn new() -> io::Result<Self> {
        const NO_SQARRAY: u32 = 1 << 16;
        // `struct io_uring_params`.
        let mut params = [0u32; 30];
        params[2] = NO_SQARRAY;
        // SAFETY: The kernel reads and writes the parameters; the descriptor is new.
        let fd = unsafe {
            OwnedFd::from_raw_fd(cvt(libc::syscall(
                libc::SYS_io_uring_setup,
                Self::ENTRIES,
                params.as_mut_ptr(),
            ) as i32)?)
        };
        let shared = |page| {
            let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
            Map::new(ptr::null_mut(), 1, RW, flags, fd.as_raw_fd(), page)
        };
        Ok(Self {
            shared: [shared(0)?, shared(0x1000_0000 / PAGE)?],
            fd,
            submitted: params[11],
            taken: params[20],
            completed: params[21],
            completions: params[25],
        })
    }

    /// An index shared with the kernel.
    fn index(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: The kernel gave the offset, within a page that lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.shared[0].addr.add(offset as usize).cast()) }
    }

    /// Submits one entry, without waiting for its completion.
    fn submit(&self, entry: [u64; 8]) -> io::Result<()> {
        let tail = self.index(self.submitted).load(Relaxed);
        let at = (tail % Self::ENTRIES) as usize * entry.len();
        for (index, word) in entry.into_iter().enumerate() {
            // SAFETY: The kernel reads the entry only after the tail has moved.
            unsafe { self.shared[1].word(0, at + index).write_volatile(word) };
        }
        self.index(self.submitted).store(tail + 1, Release);
        self.enter(1, 0)
    }

    /// Waits for a completion, and returns its result.
    fn wait(&self) -> Result<i32> {
        self.enter(0, 1)?;
        self.next().context("nothing was completed")
    }

    fn next(&self) -> Option<i32> {
        let head = self.index(self.taken).load(Relaxed);
        if head == self.index(self.completed).load(Acquire) {
            return None;
        }
        let at = self.completions + head % (2 * Self::ENTRIES) * 16 + 8;
        let result = self.index(at).load(Relaxed) as i32;
        self.index(self.taken).store(head + 1, Release);
        Some(result)
    }

    fn enter(&self, submit: u32, wait: u32) -> io::Result<()> {
        const GETEVENTS: u32 = 1;
        let fd = self.fd.as_raw_fd();
        let (mask, size) = (ptr::null::<u8>(), 0usize);
        // SAFETY: Only the shared memory, and what its entries refer to, is accessed.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                fd,
                submit,
                wait,
                GETEVENTS,
                mask,
                size,
            )
        };
        cvt(ret as i32).map(drop)
    }

    /// Registers, and so pins, buffers. With none, unregisters those registered before.
    fn register(&self, buffers: &[libc::iovec]) -> io::Result<()> {
        let (what, pointer) = if buffers.is_empty() {
            (1, ptr::null())
        } else {
            (0, buffers.as_ptr())
        };
        let fd = self.fd.as_raw_fd();
        // SAFETY: The count matches the vectors, which the kernel checks.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                fd,
                what,
                pointer,
                buffers.len(),
            )
        };
        cvt(ret as i32).map(drop)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for map in self.shared {
            let _ = map.unmap();
        }
    }
}

/// An entry that reads from `fd` into `map`, or writes `map` to `fd`.
fn entry(code: u8, fd: &OwnedFd, map: Map) -> [u64; 8] {
    const HERE: u64 = u64::MAX;
    let first = u64::from(code) | ((fd.as_raw_fd() as u64) << 32);
    let (addr, len) = (map.addr as u64, (map.pages * PAGE) as u64);
    [first, HERE, addr, len, 0, 0, 0, 0]
}

/// Data read into a registered buffer that has since been unmapped goes into the old memory, and into
/// no object. Data read into an unmapped buffer that was not registered goes nowhere.
pub fn io_uring_reads_after_an_unmap() -> Result<()> {
    match Ring::new().map_err(|err| err.raw_os_error()) {
        Err(Some(libc::ENOSYS | libc::EPERM)) => skip("no io_uring"),
        _ => as_user(HOSTILE, |_| {
            let ring = Ring::new().context("io_uring_setup")?;
            read_into_pinned(&ring, &device()?)?;
            read_into_pinned(&ring, &ioctl_file(8)?)?;
            read_into_unmapped(&ring, &device()?)
        })?
        .join(),
    }
}

fn read_into_pinned(ring: &Ring, fd: &OwnedFd) -> Result<()> {
    let map = Map::shared(fd, 8, 0)?;
    map.fill(TAG);
    ring.register(&[iovec(map)]).context("register")?;
    // Mapped first, so that it does not take the place of `map`.
    let other = Map::shared(&device()?, 1024, 0)?;
    map.unmap()?;
    expect_resident(fd, 0, "unmapped")?;
    other.fill(1);
    let again = map.cover(fd, 0)?;
    again.fill(2);

    let [from, to] = pipe()?;
    let words = buffer(8)?;
    words.fill(3);
    write_all(&to, words.part(0, 4))?;
    ring.submit(entry(IORING_OP_READ_FIXED, &from, map.part(0, 4)))?;
    let read = ring.wait()?;
    ensure!(read == 4 * PAGE as i32, "READ_FIXED: {read}");
    other.check(1)?;
    again.check(2)?;

    // The old memory has the data that was read, and its previous content after that.
    ring.submit(entry(IORING_OP_WRITE_FIXED, &to, map))?;
    let written = ring.wait()?;
    ensure!(written == 8 * PAGE as i32, "WRITE_FIXED: {written}");
    read_all(&from, words)?;
    words.part(0, 4).check(3)?;
    words.part(4, 4).check(TAG + 4)?;

    ring.register(&[]).context("unregister")?;
    again.check(2)?;
    again.unmap()?;
    expect_resident(fd, 0, "all unmapped")
}

/// A read waits for data while its buffer is unmapped.
fn read_into_unmapped(ring: &Ring, fd: &OwnedFd) -> Result<()> {
    let [from, to] = pipe()?;
    // SAFETY: No memory involved. Clears O_NONBLOCK; otherwise the read would not wait.
    cvt(unsafe { libc::fcntl(from.as_raw_fd(), libc::F_SETFL, 0) })?;
    let map = Map::shared(fd, 4, 0)?;
    map.fill(TAG);
    ring.submit(entry(IORING_OP_READ, &from, map))?;
    ensure!(ring.next().is_none(), "the read did not wait");
    let words = buffer(4)?;
    map.unmap()?;
    write_all(&to, words)?;
    let read = ring.wait()?;
    ensure!(read == -libc::EFAULT, "read into nothing: {read}");
    expect_resident(fd, 0, "unmapped")
}

/// A process maps, writes, verifies and unmaps pages. Another process of the same user constantly
/// writes into the same pages through the first one's address space.
pub fn process_vm_writev_against_unmap() -> Result<()> {
    const PAGES: usize = 16;
    const ROUNDS: u64 = 300;
    let place = Map::reserve(PAGES)?;
    as_user(HOSTILE, |_| {
        let dev = device()?;
        let file = ioctl_file(PAGES)?;
        let mut own = fork(|peer| {
            for round in 1..=ROUNDS {
                let map = place.cover(if round % 2 == 0 { &dev } else { &file }, 0)?;
                if round == 1 {
                    peer.meet()?;
                    peer.meet()?;
                }
                for page in 0..PAGES {
                    // SAFETY: Inside the mapping. The other process writes the first word.
                    unsafe { map.word(page, 1).write_volatile(round) };
                }
                std::thread::yield_now();
                for page in 0..PAGES {
                    // SAFETY: As above.
                    let (theirs, ours) = unsafe {
                        (
                            map.word(page, 0).read_volatile(),
                            map.word(page, 1).read_volatile(),
                        )
                    };
                    ensure!(ours == round, "page {page}: {ours}, expected {round}");
                    // The kernel copies byte by byte.
                    let mut bytes = theirs.to_ne_bytes().into_iter().zip(TAG.to_ne_bytes());
                    let known = bytes.all(|(found, theirs)| found == 0 || found == theirs);
                    ensure!(known, "page {page}: {theirs:#x}");
                }
                map.unmap()?;
            }
            Ok(())
        })?;

        let (mut hits, mut rng) = (0, fastrand::Rng::new());
        let word = buffer(1)?;
        word.write(0, TAG);
        let ours = libc::iovec {
            iov_len: 8,
            ..iovec(word)
        };
        let pid = own.pid;
        let mut hit = || {
            let theirs = libc::iovec {
                iov_len: 8,
                ..iovec(place.part(rng.usize(..PAGES), 1))
            };
            // SAFETY: A word of this process, and the other process's own page.
            cvt(unsafe { libc::process_vm_writev(pid, &ours, 1, &theirs, 1, 0) } as i32)
        };
        own.meet()?;
        hit().context("process_vm_writev")?;
        own.meet()?;
        loop {
            match hit().map_err(|err| err.raw_os_error()) {
                Ok(_) => hits += 1,
                Err(Some(libc::EFAULT)) => {}
                // The other process has exited, and has no memory any more.
                Err(_) => break,
            }
        }
        own.join()?;
        println!("{hits} words written");
        count("operations", hits + ROUNDS);
        expect_resident(&dev, 0, "all unmapped")?;
        expect_resident(&file, 0, "all unmapped")
    })?
    .join()
}

/// A debugger's writes behave like the process's own: they fail in read-only mappings and unmapped
/// memory, and cause a copy in private mappings.
pub fn ptrace_pokes() -> Result<()> {
    as_user(HOSTILE, |_| {
        let (dev, file) = (device()?, ioctl_file(4)?);
        for fd in [&dev, &file] {
            let keeper = Map::shared(fd, 4, 0)?;
            keeper.fill(TAG);
            let [shared, read_only, private, gone] = [(); 4].map(|()| Map::reserve(4));
            let (shared, gone) = (shared?, gone?);
            let read_only = read_only?.cover(fd, 0)?;
            let private = private?;
            Map::new(
                private.addr,
                4,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_FIXED,
                fd.as_raw_fd(),
                0,
            )?;
            read_only.protect(libc::PROT_READ)?;
            shared.cover(fd, 0)?;
            gone.cover(fd, 0)?.unmap()?;
            let child = fork(|_| {
                // SAFETY: No memory involved. Stops until continued or killed.
                unsafe {
                    cvt(libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) as i32)?;
                    cvt(libc::raise(libc::SIGSTOP))?;
                }
                shared.check(TAG + 10)?;
                private.check(TAG + 20)
            })?;
            wait(child.pid)?;
            let poke = |map: Map, page: usize, value: u64| {
                // SAFETY: The child's memory.
                cvt(unsafe {
                    libc::ptrace(libc::PTRACE_POKEDATA, child.pid, map.word(page, 0), value)
                } as i32)
            };
            for page in 0..4 {
                poke(shared, page, TAG + 10 + page as u64)?;
                poke(private, page, TAG + 20 + page as u64)?;
                expect_errno("poke, read-only", poke(read_only, page, 1), libc::EIO)?;
                expect_errno("poke, unmapped", poke(gone, page, 1), libc::EIO)?;
            }
            keeper.check(TAG + 10)?;
            // SAFETY: No memory involved. Continues the child, without a signal.
            cvt(unsafe { libc::ptrace(libc::PTRACE_CONT, child.pid, 0, 0) } as i32)?;
            child.join()?;
            keeper.check(TAG + 10)?;
            for map in [shared, read_only, private, keeper] {
                map.unmap()?;
            }
            expect_resident(fd, 0, "all unmapped")?;
        }
        Ok(())
    })?
    .join()
}
