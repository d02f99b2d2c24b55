// SPDX-License-Identifier: GPL-2.0

//! The host's memory, its processes' mappings, and the module.

use std::fs;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
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
use rustix::mount::MountFlags;
use rustix::mount::mount;
use rustix::system::delete_module;
use rustix::system::finit_module;

const MODULE: &str = "/lib/devanon/devanon.ko";
pub const DEVICE: &str = "/dev/anon";

/// How far Shmem may differ from the pages accounted for, in KiB: the VM has a few files of its own.
pub const SHMEM_TOLERANCE: i64 = 256;
/// How far free memory may differ, in KiB: it also pays for page tables and the kernel's own objects.
pub const FREE_TOLERANCE: i64 = 2 << 10;

/// The host's memory at one moment, in KiB.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub shmem: i64,
    /// MemFree plus the per-CPU lists of free pages, which MemFree leaves out.
    pub free: i64,
}

impl Memory {
    pub fn now() -> Result<Self> {
        // Folds the per-CPU counters into the global ones.
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

    /// Waits for a snapshot with about `wanted` KiB of Shmem: a killed process takes a while to exit.
    pub fn wait_shmem(wanted: i64) -> Result<Self> {
        Self::wait("Shmem", wanted, SHMEM_TOLERANCE, |now| now.shmem)
    }

    /// Waits for a snapshot with about `wanted` KiB of free memory.
    pub fn wait_free(wanted: i64) -> Result<Self> {
        Self::wait("free memory", wanted, FREE_TOLERANCE, |now| now.free)
    }

    fn wait(name: &str, wanted: i64, tolerance: i64, figure: fn(&Self) -> i64) -> Result<Self> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let now = Self::now()?;
            let is = figure(&now);
            if (is - wanted).abs() <= tolerance {
                return Ok(now);
            }
            ensure!(
                Instant::now() < end,
                "{name} is still {is} KiB, expected {wanted}, give or take {tolerance}"
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Makes the slab allocator free unused slabs. This includes objects that KASAN holds in quarantine.
pub fn shrink_caches() -> Result<()> {
    for cache in fs::read_dir("/sys/kernel/slab").context("/sys/kernel/slab")? {
        let cache = cache?;
        // The symbolic links are aliases.
        if cache.file_type()?.is_dir() {
            fs::write(cache.path().join("shrink"), "1").with_context(|| format!("{cache:?}"))?;
        }
    }
    Ok(())
}

/// Returns the number that follows `name:` at the start of a line.
pub fn field(text: &str, name: &str) -> Result<i64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next())
        .with_context(|| format!("no line {name}"))?
        .parse()
        .with_context(|| format!("no number in the line {name}"))
}

/// Returns how much of a filesystem is in use, and its size, in KiB.
pub fn filesystem_usage(path: &str) -> Result<(i64, i64)> {
    let fs = statvfs(path)?;
    let kib = |blocks: u64| (blocks * fs.f_frsize / 1024) as i64;
    Ok((kib(fs.f_blocks - fs.f_bfree), kib(fs.f_blocks)))
}

/// What UML keeps its physical memory in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Backing {
    /// A file created by the ioctl of /dev/anon.
    Anon,
    /// /dev/anon itself.
    Device,
    Memfd,
    /// A temporary file.
    File,
}

/// The file with UML's physical memory: its kind, its size in bytes, and its cost to the host in KiB.
#[derive(Clone, Copy, Debug)]
pub struct MemoryFile {
    pub backing: Backing,
    pub size: i64,
    pub cost: i64,
}

/// Finds the memory file of a UML process: the largest unnamed file that it has open, or else /dev/anon itself.
pub fn memory_file(pid: i32) -> Result<Option<MemoryFile>> {
    let mut largest: Option<MemoryFile> = None;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let target = match fs::read_link(entry.path()) {
            Ok(target) => target.to_string_lossy().into_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        let backing = match target.strip_suffix(" (deleted)") {
            Some(DEVICE) => Backing::Anon,
            Some(name) if name.starts_with("/memfd:uml-physmem") => Backing::Memfd,
            Some(name) if !name.starts_with("/memfd:") => Backing::File,
            None if target == DEVICE => Backing::Device,
            _ => continue,
        };
        let (size, cost) = match backing {
            Backing::Anon | Backing::Device => {
                let info = Path::new(&format!("/proc/{pid}/fdinfo")).join(entry.file_name());
                let info = fs::read_to_string(info)?;
                let pages = field(&info, "anon-resident")? + field(&info, "anon-swapped")?;
                let size = field(&info, "anon-size")?;
                // The device always reports the maximum size. With 0, any file found is preferred to it.
                (if backing == Backing::Device { 0 } else { size }, pages * 4)
            }
            Backing::Memfd | Backing::File => {
                let meta = fs::metadata(entry.path())?;
                (meta.len() as i64, meta.blocks() as i64 / 2)
            }
        };
        if largest.as_ref().is_none_or(|found| found.size < size) {
            largest = Some(MemoryFile {
                backing,
                size,
                cost,
            });
        }
    }
    Ok(largest)
}

/// Returns the children of a process, oldest first.
pub fn children(pid: i32) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("children"))?;
        for word in text.split_whitespace() {
            found.push(word.parse()?);
        }
    }
    Ok(found)
}

/// Returns the child of a process that uses the most CPU time within a second.
pub fn busiest_child(pid: i32) -> Result<i32> {
    // User time is field 14; the name, in parentheses, is field 2.
    let time = |pid: i32| -> Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let rest = stat.rsplit_once(')').context("stat")?.1;
        Ok(rest.split_whitespace().nth(11).context("stat")?.parse()?)
    };
    let mut before = Vec::new();
    for child in children(pid)? {
        // The child may have just exited.
        if let Ok(time) = time(child) {
            before.push((child, time));
        }
    }
    thread::sleep(Duration::from_secs(1));
    let spent =
        |&(child, before): &(i32, u64)| time(child).map_or(0, |now| now.saturating_sub(before));
    let busiest = before.iter().max_by_key(|&child| spent(child));
    Ok(busiest.context("no child")?.0)
}

/// Prints the state of all threads of a process and its children, to debug a hang.
pub fn show_threads(pid: i32) {
    let children = children(pid).unwrap_or_default();
    for pid in [pid].into_iter().chain(children) {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let status = read("status");
            let state = status.lines().filter(|line| {
                ["Name", "State", "SigPnd", "ShdPnd", "SigBlk"]
                    .contains(&line.split(':').next().unwrap_or_default())
            });
            let state: Vec<String> = state.map(|line| line.replace('\t', " ")).collect();
            eprintln!(
                "{}: {}; syscall {}",
                task.path().display(),
                state.join(", "),
                read("syscall").trim()
            );
            for line in read("stack").lines() {
                eprintln!("    {line}");
            }
        }
    }
}

/// Returns how many mappings a process has, and how many of them map the guest's memory.
pub fn mappings(pid: i32) -> Result<(usize, usize)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let of_memory = maps.lines().filter(|line| {
        line.ends_with(" (deleted)") && !line.contains("/memfd:uml-userspace")
            || line.ends_with(DEVICE)
    });
    Ok((maps.lines().count(), of_memory.count()))
}

/// Counts the mappings that could be merged with the previous one but are not: adjacent, with the
/// same permissions and the next offset of the same file.
pub fn unmerged(pid: i32) -> Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut unmerged = 0;
    // Where the last mapping ends, in memory and in the file; its permissions and file.
    let mut last = None;
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [range, perms, offset, device, inode, ..] = words[..] else {
            continue;
        };
        let (start, end) = range.split_once('-').context("maps")?;
        let hex = |text| u64::from_str_radix(text, 16);
        let (start, end, offset) = (hex(start)?, hex(end)?, hex(offset)?);
        let rest = (perms.to_owned(), device.to_owned(), inode.to_owned());
        if inode != "0" && last == Some((start, offset, rest.clone())) {
            unmerged += 1;
        }
        last = Some((end, offset + (end - start), rest));
    }
    Ok(unmerged)
}

/// Returns the processes of a user.
pub fn processes(user: u32) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let owner = entry.metadata().map(|m| m.uid());
        if owner.is_ok_and(|uid| uid == user) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Returns true if the driver is present, as a module or built in.
pub fn driver_is_present() -> Result<bool> {
    Ok(fs::exists("/sys/class/devanon")?)
}

/// Returns true if the driver is loaded as a module.
pub fn module_is_loaded() -> Result<bool> {
    Ok(fs::exists("/sys/module/devanon/refcnt")?)
}

pub fn load_module() -> Result<()> {
    if !driver_is_present()? {
        finit_module(File::open(MODULE).context(MODULE)?, c"", 0).context("loading the module")?;
    }
    Ok(())
}

/// Unloads the module, which must have no users left.
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

pub fn modprobe(modules: &[&str]) -> Result<()> {
    for module in modules {
        let status = Command::new("modprobe").arg(module).status();
        ensure!(status.context("modprobe")?.success(), "modprobe {module}");
    }
    Ok(())
}

/// Mounts an ext4 disk of the VM.
pub fn mount_disk(device: &str, directory: &str) -> Result<()> {
    modprobe(&["virtio_blk", "ext4"])?;
    fs::create_dir_all(directory)?;
    mount(device, directory, "ext4", MountFlags::empty(), None).context(device.to_owned())
}
