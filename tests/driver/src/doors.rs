// SPDX-License-Identifier: GPL-2.0

//! The two doors, the device and its ioctl: correct use, misuse, loading and unloading.

use crate::sys::*;
use anyhow::{Context, Result, ensure};
use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

pub const MODULE: &str = "/lib/devanon/devanon.ko";

const TAG: u64 = 0xd00f_0000;

pub fn node_from_devtmpfs() -> Result<()> {
    let meta = fs::metadata(DEVICE)?;
    ensure!(meta.file_type().is_char_device(), "not a character device");
    ensure!(
        meta.rdev() == libc::makedev(1, 10),
        "device {:#x}",
        meta.rdev()
    );
    ensure!(meta.mode() & 0o7777 == 0o666, "mode {:o}", meta.mode());
    let uevent = fs::read_to_string("/sys/class/devanon/anon/uevent")?;
    ensure!(uevent.contains("DEVNAME=anon"), "{uevent}");
    Ok(())
}

pub fn mknod(path: &str) -> Result<()> {
    let path = CString::new(path)?;
    // SAFETY: A string.
    cvt(unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 10)) })
        .context("mknod")?;
    Ok(())
}

pub fn node_by_hand() -> Result<()> {
    let path = "/dev/anon-by-hand";
    mknod(path)?;
    let result = open(path, libc::O_RDWR);
    fs::remove_file(path)?;
    Map::shared(&result?, 4, 0)?.fill(TAG);
    Ok(())
}

pub fn mem_devices_still_work() -> Result<()> {
    fs::write("/dev/null", "x")?;
    let mut byte = [1];
    fs::File::open("/dev/zero")?.read_exact(&mut byte)?;
    ensure!(byte == [0]);
    Ok(())
}

/// What a UML guest of 2004 does (arch/um of 2.4.23 to 2.6.16).
pub fn historic_guest() -> Result<()> {
    let _probe = device()?;
    let dev = device()?;
    let pages = 1024;
    Map::private(&dev, pages, 0)?.unmap()?;
    // SAFETY: No memory involved.
    cvt(unsafe { libc::fcntl(dev.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) })?;
    let place = Map::reserve(pages)?;
    let prot = RW | libc::PROT_EXEC;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let physmem = Map::new(place.addr, pages - 16, prot, flags, dev.as_raw_fd(), 16)?;
    physmem.fill(TAG);
    // A process of the guest maps single pages, up to the last, at other addresses.
    let process = Map::reserve(pages)?;
    for page in [16, 17, 500, pages - 1] {
        let at = process.part(page, 1);
        let map = Map::new(at.addr, 1, prot, flags, dev.as_raw_fd(), page)?;
        ensure!(map.read(0) == TAG + page as u64 - 16, "page {page}");
    }
    process.unmap()?;
    expect_resident(&dev, pages - 16, "a process of the guest is gone")?;
    physmem.check(TAG)?;
    physmem.unmap()?;
    expect_resident(&dev, 0, "the guest is gone")
}

pub fn offsets_up_to_the_limit() -> Result<()> {
    let dev = device()?;
    let limit = 1 << 51;
    for page in [1 << 20, 1 << 40, limit - 1] {
        let map = Map::shared(&dev, 1, page)?;
        map.write(0, TAG);
        expect_resident(&dev, 1, "touched")?;
        map.unmap()?;
        expect_resident(&dev, 0, "unmapped")?;
    }

    let new = |pages, page| {
        Map::new(
            ptr::null_mut(),
            pages,
            RW,
            libc::MAP_SHARED,
            dev.as_raw_fd(),
            page,
        )
    };
    expect_errno("mmap beyond the limit", new(1, limit), libc::EOVERFLOW)?;
    expect_errno("mmap across the limit", new(2, limit - 1), libc::EOVERFLOW)?;
    expect_errno("mmap that wraps", new(2, (1 << 52) - 1), libc::EOVERFLOW)
}

pub fn no_read_no_write_no_seek() -> Result<()> {
    let mut dev = fs::File::from(device()?);
    expect_errno("read", dev.read(&mut [0; 8]), libc::EINVAL)?;
    expect_errno("write", dev.write(&[0; 8]), libc::EINVAL)?;
    expect_errno("lseek", dev.seek(SeekFrom::Start(1)), libc::ESPIPE)?;
    expect_errno(
        "ftruncate",
        truncate(&OwnedFd::from(dev), PAGE),
        libc::EINVAL,
    )
}

pub fn read_only_open() -> Result<()> {
    let dev = open(DEVICE, libc::O_RDONLY)?;
    let new = |prot, flags| Map::new(ptr::null_mut(), 4, prot, flags, dev.as_raw_fd(), 0);
    expect_errno(
        "shared writable mapping",
        new(RW, libc::MAP_SHARED),
        libc::EACCES,
    )?;
    let map = new(libc::PROT_READ, libc::MAP_SHARED)?;
    map.check_zero()?;
    expect_errno("mprotect to writable", map.protect(RW), libc::EACCES)?;
    new(RW, libc::MAP_PRIVATE)?.fill(TAG);
    map.check_zero()?;

    let dev = open(DEVICE, libc::O_WRONLY)?;
    let result = Map::new(ptr::null_mut(), 4, RW, libc::MAP_SHARED, dev.as_raw_fd(), 0);
    expect_errno("mapping of a write-only open", result, libc::EACCES)
}

pub fn userfaultfd_is_refused() -> Result<()> {
    #[repr(C)]
    struct Api([u64; 3]);
    #[repr(C)]
    struct Register([u64; 4]);
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
    const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

    let register = |map: Map| -> Result<io::Result<i32>> {
        // SAFETY: The argument structures match the kernel's, and outlive the calls.
        unsafe {
            let fd = cvt(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32)
                .context("userfaultfd")?;
            let mut api = Api([0xaa, 0, 0]);
            cvt(libc::ioctl(fd, UFFDIO_API, &mut api)).context("UFFDIO_API")?;
            let length = (map.pages * PAGE) as u64;
            let mut arg = Register([map.addr as u64, length, UFFDIO_REGISTER_MODE_MISSING, 0]);
            Ok(cvt(libc::ioctl(fd, UFFDIO_REGISTER, &mut arg)))
        }
    };
    register(Map::shared(&memfd(4)?, 4, 0)?)?.context("on a memfd")?;
    expect_errno(
        "UFFDIO_REGISTER",
        register(Map::shared(&device()?, 4, 0)?)?,
        libc::EINVAL,
    )
}

pub fn fdinfo_and_maps() -> Result<()> {
    let dev = device()?;
    let file = ioctl_file(64)?;
    for (fd, size) in [(&dev, i64::MAX as u64), (&file, 64 * PAGE as u64)] {
        let map = Map::shared(fd, 64, 0)?;
        map.part(0, 48).fill(TAG);
        map.part(0, 16).unmap()?;
        let found = info(fd)?;
        let expected = Info {
            size,
            resident: 32,
            swapped: 0,
            freed: 16,
        };
        ensure!(found == expected, "{found:?}, expected {expected:?}");
        let maps = fs::read_to_string("/proc/self/maps")?;
        let line = maps
            .lines()
            .find(|line| line.starts_with(&format!("{:x}-", map.addr as usize + 16 * PAGE)))
            .context("the mapping is not in maps")?;
        ensure!(line.contains("/dev/anon"), "{line}");
    }
    // Two descriptors of one open share the file.
    ensure!(info(&dev.try_clone()?)? == info(&dev)?);
    Ok(())
}

/// The first mapping of an open creates its memory. Two processes that map at the same time must get
/// the same memory.
pub fn concurrent_first_mappings() -> Result<()> {
    const OPENS: usize = 300;
    let unmapped = Info {
        size: i64::MAX as u64,
        resident: 0,
        swapped: 0,
        freed: 0,
    };
    let all: Vec<OwnedFd> = (0..OPENS).map(|_| device()).collect::<Result<_>>()?;
    ensure!(
        info(&all[0])? == unmapped,
        "unexpected fdinfo before the first mapping"
    );
    let progress = Map::shared(&memfd(1)?, 1, 0)?;
    // Each process writes to its own page, and waits before each mmap(2) for the other to catch up.
    let map_all = |number: usize| -> Result<Vec<Map>> {
        let turn_of = |number| {
            // SAFETY: A word of a mapping that stays, and is only accessed atomically.
            unsafe { AtomicU64::from_ptr(progress.word(0, number)) }
        };
        let map = |(turn, dev)| -> Result<Map> {
            turn_of(number).store(turn, Ordering::SeqCst);
            while turn_of(1 - number).load(Ordering::SeqCst) < turn {
                std::hint::spin_loop();
            }
            let map = Map::shared(dev, 2, 0)?;
            map.write(number, TAG + number as u64);
            Ok(map)
        };
        (1..).zip(&all).map(map).collect()
    };
    let check_all = |maps: Vec<Map>| maps.iter().try_for_each(|map| map.check(TAG));
    let mut child = fork(|peer| {
        let maps = map_all(1)?;
        peer.meet()?;
        check_all(maps)?;
        peer.meet()
    })?;
    let maps = map_all(0)?;
    child.meet()?;
    check_all(maps)?;
    child.meet()?;
    child.join()
}

pub fn ioctl_file_is_a_file() -> Result<()> {
    let mut file = fs::File::from(ioctl_new(&device()?, 0, 0)?);
    let meta = file.metadata()?;
    ensure!(meta.is_file() && meta.len() == 0, "{meta:?}");
    file.write_all(b"hello, ")?;
    file.write_all(b"world")?;
    ensure!(file.metadata()?.len() == 12);
    file.seek(SeekFrom::Start(7))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text == "world", "{text}");
    file.write_all_at(b"W", 7)?;
    let mut word = [0; 5];
    file.read_exact_at(&mut word, 7)?;
    ensure!(&word == b"World", "{word:?}");

    let fd = OwnedFd::from(file);
    // SAFETY: No memory involved.
    let fallocate = |mode, offset, len| unsafe {
        cvt(libc::fallocate(fd.as_raw_fd(), mode, offset, len)).map(drop)
    };
    fallocate(0, 0, 16 * PAGE as i64)?;
    expect_resident(&fd, 16, "allocated")?;
    fallocate(
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        0,
        4 * PAGE as i64,
    )?;
    expect_resident(&fd, 12, "punched")?;
    truncate(&fd, 8 * PAGE)?;
    expect_resident(&fd, 4, "truncated")?;
    // SAFETY: No memory involved.
    let seal = cvt(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) });
    expect_errno("F_ADD_SEALS", seal, libc::EPERM)
}

pub fn ioctl_file_frees_on_unmap() -> Result<()> {
    let file = ioctl_file(64)?;
    let map = Map::shared(&file, 64, 0)?;
    let second = Map::shared(&file, 8, 8)?;
    map.fill(TAG);
    map.unmap()?;
    expect_resident(&file, 8, "kept by the second mapping")?;
    second.check(TAG + 8)?;
    second.unmap()?;
    expect_resident(&file, 0, "all unmapped")?;

    let mut file = fs::File::from(file);
    let mut content = vec![1; 64 * PAGE];
    file.read_exact(&mut content)?;
    ensure!(
        content.iter().all(|byte| *byte == 0),
        "read(2) found freed data"
    );
    Ok(())
}

pub fn ioctl_file_keeps_what_was_never_mapped() -> Result<()> {
    let file = ioctl_file(8)?;
    let page = [7u8; PAGE];
    let mut writer = fs::File::from(file.try_clone()?);
    writer.write_all(&page)?;
    writer.write_all(&page)?;
    Map::shared(&file, 4, 4)?.unmap()?;
    expect_resident(&file, 2, "other pages mapped and unmapped")?;
    Map::shared(&file, 1, 1)?.unmap()?;
    expect_resident(&file, 1, "one of the written pages mapped and unmapped")?;
    ensure!(
        Map::shared(&file, 1, 0)?.read(0) == u64::from_ne_bytes([7; 8]),
        "written data lost"
    );
    Ok(())
}

pub fn ioctl_file_outlives_the_device_file() -> Result<()> {
    let refs = module_refs()?;
    let held = refs + usize::from(need_module().is_ok());
    let file = ioctl_file(4)?;
    ensure!(
        module_refs()? == held,
        "the file does not hold one module reference"
    );
    let map = Map::shared(&file, 4, 0)?;
    map.fill(TAG);
    drop(file);
    map.check(TAG)?;
    ensure!(
        module_refs()? == held,
        "the mapping does not hold the module"
    );
    map.unmap()?;
    ensure!(module_refs()? == refs, "a module reference was leaked");
    Ok(())
}

/// A touch beyond the end of the file is a SIGBUS, as with any file.
pub fn ioctl_file_ends_at_its_size() -> Result<()> {
    let file = ioctl_file(4)?;
    let map = Map::shared(&file, 8, 0)?;
    map.part(0, 4).fill(TAG);
    let child = fork(|_| {
        map.write(4, TAG);
        Ok(())
    })?;
    let status = wait(child.pid)?;
    ensure!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS,
        "{status:#x}"
    );
    Ok(())
}

pub fn ioctl_wrong_use() -> Result<()> {
    let dev = device()?;
    expect_errno("unknown flag", ioctl_new(&dev, 2, 0), libc::EINVAL)?;
    expect_errno("all flags", ioctl_new(&dev, u32::MAX, 0), libc::EINVAL)?;
    expect_errno("reserved field", ioctl_new(&dev, 0, 1), libc::EINVAL)?;
    let raw = |cmd, arg: usize| {
        // SAFETY: At worst the kernel reads the argument.
        cvt(unsafe { libc::ioctl(dev.as_raw_fd(), cmd, arg) })
    };
    expect_errno("null pointer", raw(DEVANON_IOC_NEW, 0), libc::EFAULT)?;
    expect_errno(
        "kernel pointer",
        raw(DEVANON_IOC_NEW, usize::MAX - 7),
        libc::EFAULT,
    )?;
    let unmapped = Map::reserve(1)?;
    expect_errno(
        "unmapped pointer",
        raw(DEVANON_IOC_NEW, unmapped.addr as usize),
        libc::EFAULT,
    )?;
    for cmd in [
        0,
        0xda01,
        DEVANON_IOC_NEW + 1,
        DEVANON_IOC_NEW | 0x8000_0000,
        0x5401,
        u32::MAX.into(),
    ] {
        expect_errno(&format!("command {cmd:#x}"), raw(cmd, 0), libc::ENOTTY)?;
    }
    Ok(())
}

pub fn ioctl_cloexec() -> Result<()> {
    let dev = device()?;
    for (flags, expected) in [(0, 0), (DEVANON_CLOEXEC, libc::FD_CLOEXEC)] {
        let file = ioctl_new(&dev, flags, 0)?;
        // SAFETY: No memory involved.
        let found = cvt(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) })?;
        ensure!(found == expected, "flags {flags}: FD_CLOEXEC {found}");
    }
    Ok(())
}

/// `vm.memfd_noexec` does not apply to these files, so none is ever executable.
pub fn ioctl_file_is_not_executable() -> Result<()> {
    let file = fs::File::from(ioctl_new(&device()?, 0, 0)?);
    let mode = file.metadata()?.mode() & 0o7777;
    ensure!(mode == 0o666, "mode {mode:o}");
    // SAFETY: No memory involved.
    let chmod = cvt(unsafe { libc::fchmod(file.as_raw_fd(), 0o777) });
    expect_errno("fchmod to executable", chmod, libc::EPERM)?;
    io::copy(&mut fs::File::open("/bin/busybox")?, &mut &file)?;
    let argv = [c"true".as_ptr(), ptr::null()];
    // SAFETY: NUL-terminated strings and null-terminated arrays. Returns only on failure.
    let exec = cvt(unsafe { libc::fexecve(file.as_raw_fd(), argv.as_ptr(), argv[1..].as_ptr()) });
    expect_errno("fexecve", exec, libc::EACCES)
}

pub fn out_of_descriptors() -> Result<()> {
    let dev = device()?;
    let refs = module_refs()?;
    let limit = libc::rlimit {
        rlim_cur: dev.as_raw_fd() as u64 + 1,
        rlim_max: 4096,
    };
    // SAFETY: The kernel reads the limit.
    cvt(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })?;
    for _ in 0..100 {
        expect_errno("DEVANON_IOC_NEW", ioctl_new(&dev, 0, 0), libc::EMFILE)?;
        expect_errno("open", open(DEVICE, libc::O_RDWR), libc::EMFILE)?;
    }
    let limit = libc::rlimit {
        rlim_cur: 1024,
        rlim_max: 4096,
    };
    // SAFETY: As above.
    cvt(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })?;
    ensure!(module_refs()? == refs, "module references were leaked");
    Ok(())
}

/// 1,000 adjacent mappings of a page make as many VMAs as with a memfd: one.
/// With the device, that holds only if the driver implements `.mmap_prepare`.
pub fn vmas_merge_as_with_memfd(merges: bool) -> Result<()> {
    let pages = 1_000;
    let count = |file: &OwnedFd, down: bool| -> Result<usize> {
        let place = Map::reserve(pages)?;
        let before = vma_count()?;
        for step in 0..pages {
            let page = if down { pages - 1 - step } else { step };
            place.part(page, 1).cover(file, page)?;
        }
        let after = vma_count()?;
        place.unmap()?;
        Ok(after - before)
    };
    let refs = module_refs()?;
    for down in [false, true] {
        let peer = count(&memfd(pages)?, down)?;
        let ours = count(&ioctl_file(pages)?, down)?;
        ensure!(
            ours == peer,
            "downwards {down}: {ours} new VMAs, {peer} with a memfd"
        );
        if merges {
            let ours = count(&device()?, down)?;
            ensure!(
                ours == peer,
                "the device, downwards {down}: {ours} new VMAs, {peer} with a memfd"
            );
        }
    }
    ensure!(module_refs()? == refs, "files of the driver were leaked");
    Ok(())
}

fn reopen(fd: &OwnedFd, flags: i32) -> io::Result<OwnedFd> {
    open(&format!("/proc/self/fd/{}", fd.as_raw_fd()), flags)
}

pub fn reopened_file_keeps_the_rule() -> Result<()> {
    let file = ioctl_file(16)?;
    let again = reopen(&file, libc::O_RDWR)?;
    let map = Map::shared(&again, 16, 0)?;
    map.fill(TAG);
    ensure!(info(&file)? == info(&again)?, "not the same file");
    Map::shared(&file, 16, 0)?.check(TAG)?;
    drop(file);
    map.part(0, 8).unmap()?;
    // The mapping made through `file` is still there.
    expect_resident(&again, 16, "kept by the other file's mapping")?;

    let read_only = reopen(&again, libc::O_RDONLY)?;
    let result = Map::new(
        ptr::null_mut(),
        1,
        RW,
        libc::MAP_SHARED,
        read_only.as_raw_fd(),
        0,
    );
    expect_errno("shared writable mapping", result, libc::EACCES)?;

    let third = ioctl_file(16)?;
    let map = Map::shared(&reopen(&third, libc::O_RDWR)?, 16, 0)?;
    map.fill(TAG);
    map.part(3, 5).unmap()?;
    expect_resident(&third, 11, "unmapped through the reopened file")
}

pub fn mapping_opened_through_map_files() -> Result<()> {
    let dev = device()?;
    let map = Map::shared(&dev, 16, 0)?;
    map.fill(TAG);
    let start = map.addr as usize;
    let path = format!("/proc/self/map_files/{:x}-{:x}", start, start + 16 * PAGE);
    let file = open(&path, libc::O_RDWR).context("map_files")?;
    let second = Map::shared(&file, 16, 0)?;
    second.check(TAG)?;
    // This page is written, but never mapped: from now on, a close frees only the closed range.
    let file = fs::File::from(file);
    file.write_all_at(b"kept", 100 * PAGE as u64)?;
    map.unmap()?;
    expect_resident(&dev, 17, "kept by the second mapping")?;
    second.unmap()?;
    expect_resident(&dev, 1, "all unmapped, one page written")?;
    let mut word = [0; 4];
    file.read_exact_at(&mut word, 100 * PAGE as u64)?;
    ensure!(&word == b"kept", "{word:?}");
    Ok(())
}

pub fn module_parameter_mode() -> Result<()> {
    need_module()?;
    unload("devanon")?;
    let restrictive = load(MODULE, "mode=0600")
        .context("mode=0600")
        .and_then(|()| {
            let mode = fs::metadata(DEVICE)?.mode() & 0o7777;
            unload("devanon")?;
            ensure!(mode == 0o600, "mode {mode:o}");
            Ok(())
        });
    let wrong = ["mode=01777", "mode=09", "mode=-1", "mode=x"]
        .map(|params| expect_errno(params, load(MODULE, params), libc::EINVAL));
    load(MODULE, "")?;
    for result in wrong {
        result?;
    }
    restrictive
}

pub fn second_load_is_refused() -> Result<()> {
    need_module()?;
    expect_errno("finit_module", load(MODULE, ""), libc::EEXIST)?;
    device().map(drop)
}

pub fn unload_is_refused_while_in_use() -> Result<()> {
    need_module()?;
    let refused = |what| expect_errno(what, unload("devanon"), libc::EAGAIN);

    let dev = device()?;
    refused("unload while open")?;
    let map = Map::shared(&dev, 4, 0)?;
    map.fill(TAG);
    drop(dev);
    refused("unload while mapped")?;
    map.unmap()?;

    let file = ioctl_file(4)?;
    refused("unload while a file of the ioctl is open")?;
    drop(file);

    unload("devanon").context("unload when nothing is in use")?;
    ensure!(!Path::new(DEVICE).exists(), "the node is still there");
    load(MODULE, "").context("load again")
}

/// An `O_PATH` descriptor pins the inode, but neither the file nor the module.
pub fn o_path_outlives_the_module() -> Result<()> {
    need_module()?;
    let file = ioctl_file(4)?;
    let path = reopen(&file, libc::O_PATH)?;
    let again = reopen(&path, libc::O_RDWR).context("while a file is open")?;
    let map = Map::shared(&again, 4, 0)?;
    map.fill(TAG);
    map.unmap()?;
    expect_resident(&again, 0, "reopened through O_PATH, unmapped")?;
    drop((file, again));

    unload("devanon").context("with an O_PATH descriptor left")?;
    // Without the module, it is a plain tmpfs file.
    let plain = reopen(&path, libc::O_RDWR).context("after the module is gone");
    let used = plain.and_then(|plain| Map::shared(&plain, 4, 0)?.check_zero());
    load(MODULE, "")?;
    used
}

/// `chrdev_open()` ties an inode to the cdev it finds first, even if the open fails. On a stock
/// kernel, a node opened before the module is loaded is stale from then on, and has to be made anew.
/// A patched kernel forgets the failed open.
pub fn node_opened_too_early(node_works: bool) -> Result<()> {
    need_module()?;
    let path = "/dev/anon-early";
    unload("devanon")?;
    mknod(path)?;
    let early = open(path, libc::O_RDWR);
    let loaded = load(MODULE, "");
    let late = open(path, libc::O_RDWR);
    fs::remove_file(path)?;
    mknod(path)?;
    let anew = open(path, libc::O_RDWR);
    fs::remove_file(path)?;

    loaded?;
    expect_errno("open before the module", early, libc::ENXIO)?;
    if node_works {
        late.context("open of the same node after")?;
    } else {
        expect_errno("open of the same node after", late, libc::ENXIO)?;
    }
    anew.context("open of the node made anew")?;
    Ok(())
}

/// KUnit ran the driver's unit tests at load or at boot, and all passed.
pub fn unit_tests() -> Result<()> {
    const RESULTS: &str = "/sys/kernel/debug/kunit/devanon_range/results";
    if !fs::exists("/sys/kernel/debug/kunit")? {
        return skip("the kernel has no KUnit");
    }
    let text = fs::read_to_string(RESULTS).context(RESULTS)?;
    let count = |word: &str| {
        text.lines()
            .filter(|line| line.trim_start().starts_with(word))
            .count()
    };
    ensure!(
        count("not ok ") == 0 && count("ok ") >= 6 && !text.contains("# SKIP"),
        "{text}"
    );
    Ok(())
}

/// The complete program in docs/programs.md prints what it should.
pub fn example_program() -> Result<()> {
    let output = std::process::Command::new("/bin/example-program")
        .output()
        .context("/bin/example-program")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {text}", output.status);
    ensure!(
        text == "mapped and touched: 1024 KiB\nhalf of it unmapped: 512 KiB\n",
        "{text}"
    );
    Ok(())
}

/// An unprivileged user can do all of this, but not unload the module.
pub fn unprivileged_user() -> Result<()> {
    fork(|_| {
        // SAFETY: No memory involved.
        unsafe {
            cvt(libc::setgid(1000))?;
            cvt(libc::setuid(1000))?;
        }
        let dev = device()?;
        let map = Map::shared(&dev, 64, 0)?;
        map.fill(TAG);
        map.unmap()?;
        expect_resident(&dev, 0, "unmapped")?;
        let file = ioctl_file(4)?;
        let again = reopen(&file, libc::O_RDWR)?;
        Map::shared(&again, 4, 0)?.fill(TAG);
        expect_errno("unload", unload("devanon"), libc::EPERM)
    })?
    .join()
}
