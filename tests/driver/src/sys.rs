// SPDX-License-Identifier: GPL-2.0

//! The system calls under test, and the kernel's memory statistics.

use anyhow::{Context, Result, bail, ensure};
use libc::{c_int, c_void};
use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::{fs, ptr};

pub const PAGE: usize = 4096;
pub const DEVICE: &str = "/dev/anon";

pub const RW: c_int = libc::PROT_READ | libc::PROT_WRITE;

/// `struct devanon_new` of `include/uapi/linux/devanon.h`.
#[repr(C)]
pub struct DevanonNew {
    pub flags: u32,
    pub reserved: u32,
}
pub const DEVANON_CLOEXEC: u32 = 1;
pub const DEVANON_IOC_NEW: libc::c_ulong = 0x4008_da01;

/// Why a test cannot run on this kernel or machine. A skip is neither a failure nor a pass.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Ends a test that cannot run here: `return skip("no such thing in this kernel")`.
pub fn skip<T>(why: &str) -> Result<T> {
    Err(Skip(why.to_owned()).into())
}

/// Adds to one of the totals in the run's summary: `operations`, `pages` or `faults` (injected).
pub fn count(what: &str, number: u64) {
    println!("count: {what} {number}");
}

pub fn cvt(ret: c_int) -> io::Result<c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// Fails unless `result` is the error `errno`.
pub fn expect_errno<T>(what: &str, result: io::Result<T>, errno: c_int) -> Result<()> {
    match result {
        Ok(_) => bail!(
            "{what} succeeded, expected {}",
            io::Error::from_raw_os_error(errno)
        ),
        Err(err) if err.raw_os_error() == Some(errno) => Ok(()),
        Err(err) => bail!(
            "{what}: {err}, expected {}",
            io::Error::from_raw_os_error(errno)
        ),
    }
}

pub fn open(path: &str, flags: c_int) -> io::Result<OwnedFd> {
    let path = CString::new(path)?;
    // SAFETY: A string; the descriptor returned is new.
    unsafe {
        Ok(OwnedFd::from_raw_fd(cvt(libc::open(
            path.as_ptr(),
            flags | libc::O_CLOEXEC,
        ))?))
    }
}

/// A new open of the device.
pub fn device() -> Result<OwnedFd> {
    open(DEVICE, libc::O_RDWR).context(DEVICE)
}

pub fn ioctl_new(fd: &OwnedFd, flags: u32, reserved: u32) -> io::Result<OwnedFd> {
    let arg = DevanonNew { flags, reserved };
    // SAFETY: The kernel reads the argument; the descriptor returned is new.
    unsafe {
        Ok(OwnedFd::from_raw_fd(cvt(libc::ioctl(
            fd.as_raw_fd(),
            DEVANON_IOC_NEW,
            &arg,
        ))?))
    }
}

/// A file from the ioctl, `pages` pages long.
pub fn ioctl_file(pages: usize) -> Result<OwnedFd> {
    let file = ioctl_new(&device()?, DEVANON_CLOEXEC, 0).context("DEVANON_IOC_NEW")?;
    truncate(&file, pages * PAGE)?;
    Ok(file)
}

pub fn memfd(pages: usize) -> Result<OwnedFd> {
    // SAFETY: A string; the descriptor returned is new.
    let file = unsafe {
        OwnedFd::from_raw_fd(cvt(libc::memfd_create(
            c"peer".as_ptr(),
            libc::MFD_CLOEXEC,
        ))?)
    };
    truncate(&file, pages * PAGE)?;
    Ok(file)
}

pub fn truncate(fd: &OwnedFd, size: usize) -> io::Result<()> {
    // SAFETY: No memory involved.
    cvt(unsafe { libc::ftruncate(fd.as_raw_fd(), size as i64) }).map(drop)
}

/// Pages of address space. Dropping it unmaps nothing: the test unmaps, or its process exits.
#[derive(Clone, Copy)]
pub struct Map {
    pub addr: *mut u8,
    pub pages: usize,
}

impl Map {
    pub fn new(
        addr: *mut u8,
        pages: usize,
        prot: c_int,
        flags: c_int,
        fd: RawFd,
        page: usize,
    ) -> io::Result<Self> {
        // SAFETY: MAP_FIXED is used only over the test's own mappings.
        let addr = unsafe {
            libc::mmap(
                addr.cast(),
                pages * PAGE,
                prot,
                flags,
                fd,
                (page * PAGE) as i64,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            addr: addr.cast(),
            pages,
        })
    }

    /// Maps `pages` pages of `fd`, starting at page `page`, shared, readable and writable.
    pub fn shared(fd: &OwnedFd, pages: usize, page: usize) -> Result<Self> {
        Self::new(
            ptr::null_mut(),
            pages,
            RW,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            page,
        )
        .context("mmap, shared")
    }

    pub fn private(fd: &OwnedFd, pages: usize, page: usize) -> Result<Self> {
        Self::new(
            ptr::null_mut(),
            pages,
            RW,
            libc::MAP_PRIVATE,
            fd.as_raw_fd(),
            page,
        )
        .context("mmap, private")
    }

    /// Reserves inaccessible address space, to place mappings in.
    pub fn reserve(pages: usize) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::new(ptr::null_mut(), pages, libc::PROT_NONE, flags, -1, 0).context("mmap, reserve")
    }

    /// Maps `fd`, starting at page `page`, over this range.
    pub fn cover(self, fd: &OwnedFd, page: usize) -> Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        Self::new(self.addr, self.pages, RW, flags, fd.as_raw_fd(), page).context("mmap, fixed")
    }

    /// Maps private anonymous memory over this range.
    pub fn cover_anonymous(self) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        Self::new(self.addr, self.pages, RW, flags, -1, 0).context("mmap, anonymous")
    }

    /// The `pages` pages of this range that start at page `first`.
    pub fn part(self, first: usize, pages: usize) -> Self {
        assert!(first + pages <= self.pages);
        Self {
            addr: self.addr.wrapping_add(first * PAGE),
            pages,
        }
    }

    pub fn unmap(self) -> Result<()> {
        // SAFETY: The test's own mapping, which it does not use afterwards.
        cvt(unsafe { libc::munmap(self.addr.cast(), self.pages * PAGE) }).context("munmap")?;
        Ok(())
    }

    pub fn remap(self, pages: usize, flags: c_int, to: *mut u8) -> io::Result<Self> {
        // SAFETY: The test's own mapping and its own destination.
        let addr = unsafe {
            libc::mremap(
                self.addr.cast(),
                self.pages * PAGE,
                pages * PAGE,
                flags,
                to.cast::<c_void>(),
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            addr: addr.cast(),
            pages,
        })
    }

    pub fn advise(self, advice: c_int) -> io::Result<()> {
        // SAFETY: The test's own mapping; the test expects what the advice does to its content.
        cvt(unsafe { libc::madvise(self.addr.cast(), self.pages * PAGE, advice) }).map(drop)
    }

    pub fn protect(self, prot: c_int) -> io::Result<()> {
        // SAFETY: The test's own mapping.
        cvt(unsafe { libc::mprotect(self.addr.cast(), self.pages * PAGE, prot) }).map(drop)
    }

    pub fn lock(self) -> Result<()> {
        // SAFETY: The test's own mapping.
        cvt(unsafe { libc::mlock(self.addr.cast(), self.pages * PAGE) }).context("mlock")?;
        Ok(())
    }

    pub fn word(self, page: usize, word: usize) -> *mut u64 {
        assert!(page < self.pages && word < PAGE / 8);
        self.addr.wrapping_add(page * PAGE + word * 8).cast()
    }

    pub fn write(self, page: usize, value: u64) {
        // SAFETY: Inside the mapping, and aligned. A fault kills the test, as it should.
        unsafe { self.word(page, 0).write_volatile(value) };
    }

    pub fn read(self, page: usize) -> u64 {
        // SAFETY: As above.
        unsafe { self.word(page, 0).read_volatile() }
    }

    /// Writes `tag` plus the page's number into every page.
    pub fn fill(self, tag: u64) {
        for page in 0..self.pages {
            self.write(page, tag + page as u64);
        }
    }

    /// Fails unless every page holds what [`Map::fill`] wrote.
    pub fn check(self, tag: u64) -> Result<()> {
        for page in 0..self.pages {
            let found = self.read(page);
            ensure!(
                found == tag + page as u64,
                "page {page}: found {found:#x}, expected {:#x}",
                tag + page as u64
            );
        }
        Ok(())
    }

    /// Fails unless every byte is zero.
    pub fn check_zero(self) -> Result<()> {
        for page in 0..self.pages {
            for word in 0..PAGE / 8 {
                // SAFETY: Inside the mapping, and aligned.
                let found = unsafe { self.word(page, word).read_volatile() };
                ensure!(
                    found == 0,
                    "page {page}, word {word}: found {found:#x}, expected 0"
                );
            }
        }
        Ok(())
    }
}

/// The driver's fields in `/proc/self/fdinfo/N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    pub size: u64,
    pub resident: usize,
    pub swapped: usize,
    pub freed: u64,
}

pub fn info(fd: &OwnedFd) -> Result<Info> {
    parse_info(&fs::read_to_string(format!(
        "/proc/self/fdinfo/{}",
        fd.as_raw_fd()
    ))?)
}

pub fn parse_info(text: &str) -> Result<Info> {
    let field = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(line
            .with_context(|| format!("fdinfo has no {name}: {text}"))?
            .trim()
            .parse()?)
    };
    Ok(Info {
        size: field("anon-size:")?,
        resident: field("anon-resident:")? as usize,
        swapped: field("anon-swapped:")? as usize,
        freed: field("anon-freed:")?,
    })
}

/// Fails unless `fd` has `resident` pages in memory and none in swap.
pub fn expect_resident(fd: &OwnedFd, resident: usize, when: &str) -> Result<()> {
    let info = info(fd)?;
    ensure!(
        (info.resident, info.swapped) == (resident, 0),
        "{when}: {} pages resident and {} swapped, expected {resident} and 0",
        info.resident,
        info.swapped
    );
    Ok(())
}

/// A line of `/proc/meminfo`, in pages.
pub fn meminfo(name: &str) -> Result<usize> {
    // Folds the per-CPU counters into the totals, which otherwise lag behind.
    fs::write("/proc/sys/vm/stat_refresh", "1").context("stat_refresh")?;
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .with_context(|| format!("meminfo has no {name}"))?;
    let kib: usize = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024 / PAGE)
}

/// A file in `/proc` or `/sys`, restored to its previous value on drop.
pub struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    pub fn set(path: impl Into<PathBuf>, value: impl ToString) -> Result<Self> {
        let (path, value) = (path.into(), value.to_string());
        let what = || format!("{value} > {}", path.display());
        let text = fs::read_to_string(&path).with_context(what)?;
        // In `always [madvise] never`, the selected word.
        let selected = text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'));
        let before = selected.map_or(text.trim(), |(word, _)| word).to_owned();
        fs::write(&path, &value).with_context(what)?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, &self.before);
    }
}

/// A cgroup. On drop, its processes are killed and it is removed.
pub struct Cgroup(PathBuf);

impl Cgroup {
    pub fn new(name: &str) -> Result<Self> {
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory").context("cgroup2")?;
        let dir = Path::new("/sys/fs/cgroup").join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&dir)?;
        Ok(Self(dir))
    }

    /// Moves this process into the cgroup.
    pub fn join(&self) -> Result<()> {
        self.set("cgroup.procs", 0)
    }

    pub fn set(&self, file: &str, value: usize) -> Result<()> {
        fs::write(self.0.join(file), value.to_string()).with_context(|| file.to_owned())
    }

    /// The value of `name` in `file`, whose lines are a name and a number each.
    fn line(&self, file: &str, name: &str) -> Result<usize> {
        let text = fs::read_to_string(self.0.join(file))?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let line = line.with_context(|| format!("{file} has no {name}"))?;
        Ok(line.trim().parse()?)
    }

    /// The count of event `name` in `memory.events`.
    pub fn events(&self, name: &str) -> Result<usize> {
        self.line("memory.events", name)
    }

    /// Pages charged for shared memory.
    pub fn shmem(&self) -> Result<usize> {
        Ok(self.line("memory.stat", "shmem")? / PAGE)
    }

    /// All pages charged, in memory (`memory.current`) or in swap (`memory.swap.current`).
    pub fn charged(&self, file: &str) -> Result<usize> {
        let text = fs::read_to_string(self.0.join(file))?;
        Ok(text.trim().parse::<usize>()? / PAGE)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write("/sys/fs/cgroup/cgroup.procs", "0");
        let _ = self.set("cgroup.kill", 1);
        // The directory stays busy until the last process is gone.
        for _ in 0..1000 {
            if fs::remove_dir(&self.0).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// Number of mappings of this process.
pub fn vma_count() -> Result<usize> {
    Ok(fs::read_to_string("/proc/self/maps")?.lines().count())
}

/// Another process, synchronized with this one step by step.
pub struct Peer {
    pub pid: c_int,
    stream: UnixStream,
}

impl Peer {
    /// Waits until the other side calls this as well.
    pub fn meet(&mut self) -> Result<()> {
        self.stream.write_all(b".").context("peer is gone")?;
        self.stream.read_exact(&mut [0]).context("peer is gone")
    }

    /// Waits for the process to exit; fails unless its status is 0.
    pub fn join(self) -> Result<()> {
        let status = wait(self.pid)?;
        ensure!(
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
            "child: status {status:#x}"
        );
        Ok(())
    }

    pub fn kill(self) -> Result<()> {
        // SAFETY: Our own child.
        cvt(unsafe { libc::kill(self.pid, libc::SIGKILL) })?;
        wait(self.pid)?;
        Ok(())
    }
}

pub fn wait(pid: c_int) -> Result<c_int> {
    let mut status = 0;
    // SAFETY: The kernel writes the status.
    cvt(unsafe { libc::waitpid(pid, &mut status, 0) }).context("waitpid")?;
    Ok(status)
}

/// Runs `body` in a child process.
pub fn fork(body: impl FnOnce(&mut Peer) -> Result<()>) -> Result<Peer> {
    let (ours, theirs) = UnixStream::pair()?;
    // SAFETY: Tests are single-threaded when they fork, so the child may call anything.
    let pid = cvt(unsafe { libc::fork() }).context("fork")?;
    if pid != 0 {
        return Ok(Peer { pid, stream: ours });
    }

    drop(ours);
    let status = match body(&mut Peer {
        pid: 0,
        stream: theirs,
    }) {
        Ok(()) => 0,
        Err(err) => {
            eprintln!("child: {err:#}");
            1
        }
    };
    // SAFETY: Ends the child.
    unsafe { libc::_exit(status) }
}

/// `finit_module(2)`.
pub fn load(path: &str, params: &str) -> io::Result<()> {
    let file = open(path, libc::O_RDONLY)?;
    let params = CString::new(params)?;
    // SAFETY: A descriptor and a string.
    let ret =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), params.as_ptr(), 0) };
    cvt(ret as c_int).map(drop)
}

/// `delete_module(2)`.
pub fn unload(name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: A string.
    let ret = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    cvt(ret as c_int).map(drop)
}

/// Skips the test if the driver is built in: there is no module to load and unload.
pub fn need_module() -> Result<()> {
    if fs::exists(REFCNT)? {
        Ok(())
    } else {
        skip("the driver is built in")
    }
}

const REFCNT: &str = "/sys/module/devanon/refcnt";

/// The module's reference count; 0 if the driver is built in.
pub fn module_refs() -> Result<usize> {
    if need_module().is_err() {
        return Ok(0);
    }
    Ok(fs::read_to_string(REFCNT)?.trim().parse()?)
}
