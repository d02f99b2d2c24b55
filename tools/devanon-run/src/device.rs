// SPDX-License-Identifier: GPL-2.0

//! Checks that `/dev/anon` can provide memory for UML, and says what to do if it cannot.

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
        // SAFETY: the kernel has just created this descriptor; nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

/// Explains a failed open.
fn open_failure(error: Errno) -> Failure {
    let loaded = Path::new("/sys/class/devanon").exists();
    match error {
        Errno::NOENT if loaded => Failure::new(
            120,
            "the driver is present but /dev/anon does not exist: mknod -m 666 /dev/anon c 1 10",
        ),
        Errno::NOENT => Failure::new(
            120,
            "/dev/anon does not exist; load the module first: modprobe devanon",
        ),
        // The kernel caches the result of the driver lookup in the inode, even if the open fails.
        Errno::NXIO if loaded => Failure::new(
            120,
            "/dev/anon was opened before the module was loaded, and that node stays unusable: \
             rm /dev/anon; mknod -m 666 /dev/anon c 1 10",
        ),
        Errno::NXIO => Failure::new(
            120,
            "/dev/anon exists but its driver is not loaded: rm /dev/anon; modprobe devanon",
        ),
        Errno::ACCESS
            if statvfs(DEVICE).is_ok_and(|fs| fs.f_flag.contains(StatVfsMountFlags::NODEV)) =>
        {
            Failure::new(121, "/dev/anon is on a filesystem mounted nodev")
        }
        // Mode bits and a nodev mount give EACCES; EPERM is the device cgroup or a sandbox.
        Errno::PERM => Failure::new(
            121,
            "the container, unit or sandbox does not allow /dev/anon: DeviceAllow=/dev/anon rw, or --device /dev/anon",
        ),
        Errno::ACCESS => Failure::new(
            121,
            "no permission to open /dev/anon; as root: chmod 666 /dev/anon",
        ),
        error => Failure::new(120, format!("cannot open /dev/anon: {error}")),
    }
}

/// Tries what UML will do: open the device, create a file, map it executable.
pub fn check() -> Result<(), Failure> {
    let device =
        open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(open_failure)?;
    let not_devanon = || Failure::new(120, "/dev/anon is not the devanon device");
    if !FileType::from_raw_mode(fstat(&device)?.st_mode).is_char_device() {
        return Err(not_devanon());
    }
    // SAFETY: any other device rejects the command.
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
        Errno::NOTTY | Errno::INVAL => not_devanon(),
        error => Failure::new(125, format!("cannot create a file on /dev/anon: {error}")),
    })?;
    ftruncate(&file, PAGE as u64)?;
    map_executable(file.as_fd()).map_err(|error| match error {
        Errno::PERM | Errno::ACCESS => Failure::new(
            122,
            "memory that is both writable and executable is denied, and UML needs it: \
             look for MemoryDenyWriteExecute= or another security policy",
        ),
        error => Failure::new(125, format!("cannot map a file of /dev/anon: {error}")),
    })
}

fn map_executable(file: rustix::fd::BorrowedFd<'_>) -> Result<(), Errno> {
    let prot = ProtFlags::READ | ProtFlags::WRITE | ProtFlags::EXEC;
    // SAFETY: a new mapping, at an address chosen by the kernel, unmapped before anything uses it.
    unsafe {
        let at = mmap(ptr::null_mut(), PAGE, prot, MapFlags::SHARED, file, 0)?;
        munmap(at, PAGE)
    }
}
