// SPDX-License-Identifier: GPL-2.0

//! Whether `/dev/anon` can give a UML its memory, and what to do if not.

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::ptr;

use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::StatVfsMountFlags;
use rustix::fs::fstat;
use rustix::fs::ftruncate;
use rustix::fs::open;
use rustix::fs::statvfs;
use rustix::io::Errno;
use rustix::ioctl::Ioctl;
use rustix::ioctl::IoctlOutput;
use rustix::ioctl::Opcode;
use rustix::ioctl::ioctl;
use rustix::ioctl::opcode;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use rustix::mm::mmap;
use rustix::mm::munmap;

use crate::Failure;

const DEVICE: &str = "/dev/anon";
const PAGE: usize = 4096;

/// `struct devanon_new` of include/uapi/linux/devanon.h.
#[repr(C)]
struct DevanonNew {
    flags: u32,
    reserved: u32,
}

const DEVANON_CLOEXEC: u32 = 1;

// SAFETY: the command reads a `struct devanon_new` and returns a descriptor.
unsafe impl Ioctl for DevanonNew {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::write::<Self>(0xda, 1)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(self).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> Result<OwnedFd, Errno> {
        // SAFETY: a descriptor that the kernel has just made, and nobody else knows.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

/// The sentence for a failed open.
fn open_failure(error: Errno) -> Failure {
    let loaded = Path::new("/sys/class/devanon").exists();
    match error {
        Errno::NOENT if loaded => Failure::new(
            120,
            "there is no /dev/anon although its driver is there: mknod -m 666 /dev/anon c 1 10",
        ),
        Errno::NOENT => Failure::new(
            120,
            "there is no /dev/anon: load the module first, modprobe devanon",
        ),
        // The kernel remembers in the inode what an open found, even when the open failed.
        Errno::NXIO if loaded => Failure::new(
            120,
            "/dev/anon was opened before the module was loaded, and that node stays dead: \
             rm /dev/anon; mknod -m 666 /dev/anon c 1 10",
        ),
        Errno::NXIO => Failure::new(
            120,
            "/dev/anon is there but not its driver: rm /dev/anon; modprobe devanon",
        ),
        Errno::ACCESS
            if statvfs(DEVICE).is_ok_and(|fs| fs.f_flag.contains(StatVfsMountFlags::NODEV)) =>
        {
            Failure::new(121, "/dev/anon lies on a filesystem mounted nodev")
        }
        // The node's mode and its filesystem give EACCES.
        Errno::PERM => Failure::new(
            121,
            "a container, unit or sandbox may not open /dev/anon: DeviceAllow=/dev/anon rw, or --device /dev/anon",
        ),
        Errno::ACCESS => Failure::new(
            121,
            "no permission to open /dev/anon: as root, chmod 666 /dev/anon",
        ),
        error => Failure::new(120, format!("cannot open /dev/anon: {error}")),
    }
}

/// Does once what the UML will do: open, make a file, map it executable.
pub fn check() -> Result<(), Failure> {
    let device =
        open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(open_failure)?;
    let other = || {
        Failure::new(
            120,
            "/dev/anon is something else than the device of devanon",
        )
    };
    if !FileType::from_raw_mode(fstat(&device)?.st_mode).is_char_device() {
        return Err(other());
    }
    // SAFETY: a file that does not know the command refuses it.
    let file = unsafe {
        ioctl(
            &device,
            DevanonNew {
                flags: DEVANON_CLOEXEC,
                reserved: 0,
            },
        )
    };
    let file = file.map_err(|error| match error {
        Errno::NOTTY | Errno::INVAL => other(),
        error => Failure::new(125, format!("/dev/anon makes no file: {error}")),
    })?;
    ftruncate(&file, PAGE as u64)?;
    map_executable(file.as_fd()).map_err(|error| match error {
        Errno::PERM | Errno::ACCESS => Failure::new(
            122,
            "this process may not have memory that is both written to and executed, and UML needs \
             that: look for MemoryDenyWriteExecute= or another security policy",
        ),
        error => Failure::new(125, format!("cannot map memory of /dev/anon: {error}")),
    })
}

fn map_executable(file: rustix::fd::BorrowedFd<'_>) -> Result<(), Errno> {
    let rights = ProtFlags::READ | ProtFlags::WRITE | ProtFlags::EXEC;
    // SAFETY: a new mapping, at an address of the kernel's choice, unmapped before anybody uses it.
    unsafe {
        let at = mmap(ptr::null_mut(), PAGE, rights, MapFlags::SHARED, file, 0)?;
        munmap(at, PAGE)
    }
}
