// SPDX-License-Identifier: GPL-2.0

//! What the host says about its memory, and the module.

use std::fs;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::makedev;
use rustix::fs::mknodat;
use rustix::fs::statvfs;
use rustix::system::delete_module;
use rustix::system::finit_module;

const MODULE: &str = "/lib/devanon/devanon.ko";
pub const DEVICE: &str = "/dev/anon";

/// Shmem may differ by so much, in KiB, from the pages we know of: the VM's own few files.
pub const SHMEM_TOLERANCE: i64 = 256;
/// Free memory may differ by so much more, in KiB: page tables, and the kernel's own objects.
pub const FREE_TOLERANCE: i64 = 2 << 10;

/// The host's memory at one moment, in KiB.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub shmem: i64,
    /// MemFree and the free pages in the lists of each CPU, which MemFree leaves out.
    pub free: i64,
}

impl Memory {
    pub fn now() -> Result<Self> {
        // Each CPU counts for itself at first; this adds the counts up.
        fs::write("/proc/sys/vm/stat_refresh", "1").context("stat_refresh")?;
        let mut free = 0;
        for line in fs::read_to_string("/proc/zoneinfo")?.lines() {
            let mut words = line.split_whitespace();
            if let Some("nr_free_pages" | "count:") = words.next() {
                free += words.next().context("zoneinfo")?.parse::<i64>()? * 4;
            }
        }
        Ok(Self {
            shmem: field(&fs::read_to_string("/proc/meminfo")?, "Shmem")?,
            free,
        })
    }

    /// The first snapshot with so much Shmem: a process that was killed goes away by and by.
    pub fn with_shmem(wanted: i64) -> Result<Self> {
        Self::with("Shmem", wanted, SHMEM_TOLERANCE, |now| now.shmem)
    }

    /// The first snapshot with so much free memory.
    pub fn with_free(wanted: i64) -> Result<Self> {
        Self::with("free memory", wanted, FREE_TOLERANCE, |now| now.free)
    }

    fn with(name: &str, wanted: i64, tolerance: i64, figure: fn(&Self) -> i64) -> Result<Self> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let now = Self::now()?;
            let is = figure(&now);
            if (is - wanted).abs() <= tolerance {
                return Ok(now);
            }
            ensure!(
                Instant::now() < end,
                "{name} is still {is} KiB, wanted {wanted}, give or take {tolerance}"
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Has the slab allocator give back what is in no use; KASAN keeps that from it for a while.
pub fn shrink_caches() -> Result<()> {
    for cache in fs::read_dir("/sys/kernel/slab").context("/sys/kernel/slab")? {
        let cache = cache?;
        // The links are second names.
        if cache.file_type()?.is_dir() {
            fs::write(cache.path().join("shrink"), "1").with_context(|| format!("{cache:?}"))?;
        }
    }
    Ok(())
}

/// The number after `name:` on a line of its own.
pub fn field(text: &str, name: &str) -> Result<i64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next())
        .with_context(|| format!("no line {name}"))?
        .parse()
        .with_context(|| format!("no number in the line {name}"))
}

/// KiB in use on a filesystem, and its size.
pub fn filesystem(path: &str) -> Result<(i64, i64)> {
    let fs = statvfs(path)?;
    let kib = |blocks: u64| (blocks * fs.f_frsize / 1024) as i64;
    Ok((kib(fs.f_blocks - fs.f_bfree), kib(fs.f_blocks)))
}

/// What a file of /dev/anon says about itself: bytes, and KiB of the pages in memory.
pub struct Anon {
    pub size: i64,
    pub resident: i64,
}

/// The largest file of /dev/anon that a process has open: a UML's physical memory.
pub fn memory_file(pid: i32) -> Result<Option<Anon>> {
    let mut largest: Option<Anon> = None;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let target = match fs::read_link(entry.path()) {
            Ok(target) => target,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        if target != Path::new("/dev/anon (deleted)") {
            continue;
        }
        let info = Path::new(&format!("/proc/{pid}/fdinfo")).join(entry.file_name());
        let info = fs::read_to_string(info)?;
        let size = field(&info, "anon-size")?;
        if largest.as_ref().is_none_or(|found| found.size < size) {
            largest = Some(Anon {
                size,
                resident: field(&info, "anon-resident")? * 4,
            });
        }
    }
    Ok(largest)
}

/// Is the driver there, as a module or built in?
pub fn is_driver_there() -> Result<bool> {
    Ok(fs::exists("/sys/class/devanon")?)
}

/// Is the driver there as a module?
pub fn is_module() -> Result<bool> {
    Ok(fs::exists("/sys/module/devanon/refcnt")?)
}

pub fn load_module() -> Result<()> {
    if !is_driver_there()? {
        finit_module(File::open(MODULE).context(MODULE)?, c"", 0).context("loading the module")?;
    }
    Ok(())
}

/// Unloads the module; nothing may hold it any more.
pub fn unload_module() -> Result<()> {
    let users = fs::read_to_string("/sys/module/devanon/refcnt")?;
    ensure!(
        users.trim() == "0",
        "the module still has {} users",
        users.trim()
    );
    delete_module(c"devanon", 0).context("unloading the module")?;
    Ok(())
}

/// mknod -m 666 /dev/anon c 1 10
pub fn make_node() -> Result<()> {
    mknodat(
        CWD,
        DEVICE,
        FileType::CharacterDevice,
        Mode::empty(),
        makedev(1, 10),
    )?;
    chmod(DEVICE, 0o666)
}

pub fn remove_node() -> Result<()> {
    match fs::remove_file(DEVICE) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

pub fn chmod(path: &str, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).context(path.to_owned())
}
