// SPDX-License-Identifier: GPL-2.0

//! The doors and their peers: for each, how to map its pages and how to give them back.

use std::ffi::c_void;
use std::fs;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::ptr;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::fs::CWD;
use rustix::fs::FallocateFlags;
use rustix::fs::MemfdFlags;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::fallocate;
use rustix::fs::ftruncate;
use rustix::fs::memfd_create;
use rustix::fs::openat;
use rustix::io;
use rustix::mm::Advice;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use rustix::mm::madvise;
use rustix::mm::mmap;
use rustix::mm::mmap_anonymous;
use rustix::mm::munmap;

pub const PAGE: usize = 4096;
/// Pages of a huge page.
pub const HUGE: usize = 512;
/// The mount point of a tmpfs for temporary files, large enough for all benchmarks.
pub const TMPFS: &str = "/bench";

const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A source of pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Subject {
    /// `mmap` of /dev/anon itself.
    Device,
    /// The file of /dev/anon's ioctl.
    Ioctl,
    /// memfd_create(2); pages are given back by punching a hole with fallocate(2).
    Memfd,
    /// A temporary file on tmpfs; pages are given back by MADV_REMOVE.
    Tmpfs,
    /// A shared mapping of /dev/zero; pages are freed when it is unmapped as a whole.
    Zero,
    /// Private anonymous memory: no file, no sharing. The best possible case.
    Private,
}

use Subject::*;

/// The subjects with a file descriptor: any part of them can be mapped, more than once.
pub const FILES: &[Subject] = &[Device, Ioctl, Memfd, Tmpfs];
pub const ALL: &[Subject] = &[Device, Ioctl, Memfd, Tmpfs, Zero, Private];
/// All but [`Zero`], of which no part can be given back.
pub const PARTS: &[Subject] = &[Device, Ioctl, Memfd, Tmpfs, Private];

impl Subject {
    pub fn name(self) -> &'static str {
        match self {
            Device => "device",
            Ioctl => "ioctl",
            Memfd => "memfd",
            Tmpfs => "tmpfs",
            Zero => "zero",
            Private => "private",
        }
    }

    /// Number of pages of this kind in the whole machine.
    pub fn resident(self) -> Result<usize> {
        // Folds the per-CPU counters into the total.
        fs::write("/proc/sys/vm/stat_refresh", "1").context("stat_refresh")?;
        vmstat(match self {
            Private => "nr_anon_pages",
            _ => "nr_shmem",
        })
    }

    /// A descriptor of new memory, with size 0 if the size can be set.
    pub fn open(self) -> io::Result<Option<OwnedFd>> {
        let open = |path, flags| openat(CWD, path, flags | OFlags::RDWR, Mode::RUSR | Mode::WUSR);
        Ok(Some(match self {
            Device => open("/dev/anon", OFlags::empty())?,
            Ioctl => new_file(&open("/dev/anon", OFlags::empty())?)?,
            Memfd => memfd_create("bench", MemfdFlags::empty())?,
            Tmpfs => open(TMPFS, OFlags::TMPFILE)?,
            Zero => open("/dev/zero", OFlags::empty())?,
            Private => return Ok(None),
        }))
    }
}

/// A counter in /proc/vmstat.
pub fn vmstat(name: &str) -> Result<usize> {
    let text = fs::read_to_string("/proc/vmstat")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no {name}"))?.parse()?)
}

/// `DEVANON_IOC_NEW` of include/uapi/linux/devanon.h.
pub fn new_file(device: &OwnedFd) -> io::Result<OwnedFd> {
    const DEVANON_IOC_NEW: libc::c_ulong = 0x4008_da01;
    let new = [0u32; 2];
    // SAFETY: the request reads two words.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), DEVANON_IOC_NEW, &raw const new) };
    if fd < 0 {
        let errno = std::io::Error::last_os_error().raw_os_error();
        return Err(io::Errno::from_raw_os_error(errno.unwrap_or(libc::EIO)));
    }
    // SAFETY: a new descriptor, which is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The memory of one object.
pub struct Memory {
    pub subject: Subject,
    pub fd: Option<OwnedFd>,
}

impl Memory {
    pub fn new(subject: Subject, pages: usize) -> Result<Self> {
        let fd = subject
            .open()
            .with_context(|| format!("no {}", subject.name()))?;
        if let (Ioctl | Memfd | Tmpfs, Some(fd)) = (subject, &fd) {
            ftruncate(fd, (pages * PAGE) as u64)?;
        }
        Ok(Self { subject, fd })
    }

    /// Maps `pages` pages from `page` on, aligned to a huge page, so that all subjects need the same
    /// page tables and can have huge pages.
    pub fn map(&self, page: usize, pages: usize) -> Result<Map> {
        let room = Map::reserve(pages + HUGE)?;
        room.unmap()?;
        self.map_over(room.aligned(HUGE, pages), page)
    }

    /// Maps pages wherever there is room.
    pub fn map_anywhere(&self, page: usize, pages: usize) -> Result<Map> {
        self.map_at(ptr::null_mut(), MapFlags::empty(), page, pages)
    }

    /// Maps pages in place of what is mapped there.
    pub fn map_over(&self, there: Map, page: usize) -> Result<Map> {
        self.map_at(there.start, MapFlags::FIXED, page, there.pages)
    }

    fn map_at(&self, at: *mut u8, flags: MapFlags, page: usize, pages: usize) -> Result<Map> {
        let (at, size) = (at.cast(), pages * PAGE);
        // SAFETY: a fixed address replaces a mapping of this process that nobody points into.
        let start = unsafe {
            match &self.fd {
                Some(fd) => {
                    let offset = (page * PAGE) as u64;
                    mmap(at, size, RW, flags | MapFlags::SHARED, fd, offset)?
                }
                None => mmap_anonymous(at, size, RW, flags | MapFlags::PRIVATE)?,
            }
        };
        Ok(Map {
            start: start.cast(),
            pages,
        })
    }

    /// Unmaps pages and frees them, by whatever calls that takes. `page` is the offset of the first
    /// one in the file.
    #[inline]
    pub fn give_back(&self, map: Map, page: usize) -> Result<()> {
        match self.subject {
            Device | Ioctl | Zero | Private => map.unmap()?,
            Memfd => {
                map.unmap()?;
                self.punch(page, map.pages)?;
            }
            Tmpfs => {
                map.remove()?;
                map.unmap()?;
            }
        }
        Ok(())
    }

    /// Unmaps the rest of `map`, and frees all its pages.
    pub fn discard(&self, map: Map) -> Result<()> {
        map.unmap()?;
        if matches!(self.subject, Memfd | Tmpfs) {
            self.punch(0, map.pages)?;
        }
        Ok(())
    }

    /// Frees pages of a file, mapped or not.
    pub fn punch(&self, page: usize, pages: usize) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let fd = self.fd.as_ref().context("no file")?;
        Ok(fallocate(
            fd,
            flags,
            (page * PAGE) as u64,
            (pages * PAGE) as u64,
        )?)
    }
}

/// Pages mapped in this process.
#[derive(Clone, Copy)]
pub struct Map {
    start: *mut u8,
    pub pages: usize,
}

impl Map {
    /// Reserves inaccessible address space, to map over.
    pub fn reserve(pages: usize) -> Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping, wherever there is room.
        let start =
            unsafe { mmap_anonymous(ptr::null_mut(), pages * PAGE, ProtFlags::empty(), flags)? };
        Ok(Self {
            start: start.cast(),
            pages,
        })
    }

    /// Maps pages of a file over this, read-only.
    #[inline]
    pub fn cover(self, file: impl AsFd, page: usize) -> io::Result<()> {
        let (flags, offset) = (MapFlags::SHARED | MapFlags::FIXED, (page * PAGE) as u64);
        // SAFETY: it replaces a mapping of this process that nobody points into.
        unsafe {
            mmap(
                self.start.cast::<c_void>(),
                self.pages * PAGE,
                ProtFlags::READ,
                flags,
                file,
                offset,
            )?
        };
        Ok(())
    }

    pub fn part(self, first: usize, pages: usize) -> Self {
        assert!(first + pages <= self.pages);
        Self {
            start: self.start.wrapping_add(first * PAGE),
            pages,
        }
    }

    /// `pages` pages of this, from the first address that is a multiple of `alignment` pages.
    pub fn aligned(self, alignment: usize, pages: usize) -> Self {
        let first = (self.start as usize).next_multiple_of(alignment * PAGE);
        self.part((first - self.start as usize) / PAGE, pages)
    }

    /// The parts of `pages` pages each, with the index of their first page.
    pub fn pieces(self, pages: usize) -> impl Iterator<Item = (usize, Self)> {
        (0..self.pages)
            .step_by(pages)
            .map(move |page| (page, self.part(page, pages)))
    }

    #[inline]
    pub fn unmap(self) -> io::Result<()> {
        // SAFETY: a mapping of this process that nobody points into any more.
        unsafe { munmap(self.start.cast(), self.pages * PAGE) }
    }

    #[inline]
    pub fn remove(self) -> io::Result<()> {
        self.advise(Advice::LinuxRemove)
    }

    pub fn page_out(self) -> io::Result<()> {
        self.advise(Advice::LinuxPageOut)
    }

    fn advise(self, advice: Advice) -> io::Result<()> {
        // SAFETY: nobody keeps a reference into the mapping.
        unsafe { madvise(self.start.cast(), self.pages * PAGE, advice) }
    }

    #[inline]
    pub fn write(self, page: usize, value: u64) {
        // SAFETY: mapped and aligned.
        unsafe {
            self.start
                .add(page * PAGE)
                .cast::<u64>()
                .write_volatile(value)
        }
    }

    #[inline]
    pub fn read(self, page: usize) -> u64 {
        // SAFETY: as above.
        unsafe { self.start.add(page * PAGE).cast::<u64>().read_volatile() }
    }

    /// Writes to each page.
    #[inline]
    pub fn write_all(self) {
        for page in 0..self.pages {
            self.write(page, page as u64 + 1);
        }
    }

    /// Reads each page, and returns the sum.
    #[inline]
    pub fn read_all(self) -> u64 {
        (0..self.pages).map(|page| self.read(page)).sum()
    }

    /// Number of pages in memory.
    pub fn in_core(self) -> Result<usize> {
        let mut pages = vec![0u8; self.pages];
        // SAFETY: there is a byte for each page.
        let done =
            unsafe { libc::mincore(self.start.cast(), self.pages * PAGE, pages.as_mut_ptr()) };
        ensure!(done == 0, "mincore: {}", std::io::Error::last_os_error());
        Ok(pages.iter().filter(|page| *page & 1 != 0).count())
    }

    /// Number of VMAs that begin in this range.
    pub fn vmas(self) -> Result<usize> {
        let (first, end) = (self.start as usize, self.start as usize + self.pages * PAGE);
        let maps = fs::read_to_string("/proc/self/maps")?;
        let starts = maps
            .lines()
            .filter_map(|line| usize::from_str_radix(line.split('-').next()?, 16).ok());
        Ok(starts.filter(|start| (first..end).contains(start)).count())
    }
}

/// A file of distinct pages in the page cache, like the disk image of a guest.
pub fn image(pages: usize) -> Result<File> {
    let file = Tmpfs.open()?.context("no file")?;
    ftruncate(&file, (pages * PAGE) as u64)?;
    let memory = Memory {
        subject: Tmpfs,
        fd: Some(file),
    };
    let map = memory.map(0, pages)?;
    for page in 0..pages {
        map.write(page, image_word(page));
    }
    map.unmap()?;
    let fd = memory.fd.context("no file")?;
    Ok(fd.into())
}

/// The first word of a page of the image.
pub fn image_word(page: usize) -> u64 {
    !(page as u64)
}

/// Fails unless a number is as expected.
pub fn expect(what: &str, found: usize, expected: usize) -> Result<()> {
    ensure!(found == expected, "{what}: {found}, expected {expected}");
    Ok(())
}

/// Sets the limit of open descriptors.
pub fn allow_files(files: u64) -> Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let limit = Rlimit {
        current: Some(files),
        maximum: Some(files),
    };
    Ok(setrlimit(Resource::Nofile, limit)?)
}
