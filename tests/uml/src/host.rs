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
use anyhow::bail;
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

/// A snapshot of /proc/meminfo, in KiB.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub available: i64,
    pub shmem: i64,
}

impl Memory {
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/meminfo")?;
        Ok(Self {
            available: field(&text, "MemAvailable")?,
            shmem: field(&text, "Shmem")?,
        })
    }

    /// Waits until Shmem has fallen so far: a process that was killed goes away by and by.
    pub fn after_fall_to(shmem: i64) -> Result<Self> {
        Self::when(|now| now.shmem <= shmem)
    }

    /// Waits until so much is available: freed pages first pile up in lists of each CPU, which
    /// the kernel counts as used, and empties by and by.
    pub fn after_rise_to(available: i64) -> Result<Self> {
        Self::when(|now| now.available >= available)
    }

    /// The first snapshot that satisfies, or the one after ten seconds.
    fn when(satisfies: impl Fn(&Self) -> bool) -> Result<Self> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let now = Self::now()?;
            if satisfies(&now) || Instant::now() > end {
                return Ok(now);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
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

pub fn load_module() -> Result<()> {
    if !Path::new("/sys/module/devanon").exists() {
        finit_module(File::open(MODULE).context(MODULE)?, c"", 0).context("loading the module")?;
    }
    Ok(())
}

/// Unloads the module; nothing may hold it any more.
pub fn unload_module() -> Result<()> {
    let users = fs::read_to_string("/sys/module/devanon/refcnt")?;
    if users.trim() != "0" {
        bail!("the module still has {} users", users.trim());
    }
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
