// SPDX-License-Identifier: GPL-2.0

//! Preloaded into a User-Mode Linux, this library answers one open: the one that makes the
//! file behind the guest's memory. The answer is an anonymous file of `/dev/anon`.
//!
//! UML opens `O_TMPFILE | O_EXCL | O_RDWR`, mode 0700, in a temporary directory: a file that
//! has no name and can never get one. The file of `/dev/anon` is such a file too. Every other
//! open goes to the C library as it is.
//!
//! `devanon-run` sets this up. By hand it is `LD_PRELOAD=/path/libdevanon_preload.so linux.uml ...`.

use std::ffi::CStr;
use std::ffi::c_char;
use std::ffi::c_int;
use std::ffi::c_ulong;
use std::ffi::c_void;
use std::io::Error;
use std::io::Write;
use std::ptr;

/// `struct devanon_new` of include/uapi/linux/devanon.h.
#[repr(C)]
struct DevanonNew {
    flags: u32,
    reserved: u32,
}

/// `_IOW(0xDA, 0x01, struct devanon_new)`
const DEVANON_IOC_NEW: c_ulong = 0x4008_da01;
const DEVANON_CLOEXEC: u32 = 1;
const DEVICE: &CStr = c"/dev/anon";

/// Where to say that UML has its memory file: `<descriptor>:<inode>` of a socket. The inode is
/// there because the descriptor may be closed, and its number taken by another file.
const REPORT_ENV: &CStr = c"DEVANON_RUN_REPORT";

const PAGE: usize = 4096;

/// Whether these are the arguments of UML's `make_tempfile()`. Older ones lack `O_CLOEXEC`.
fn is_memory_file(flags: c_int, mode: libc::mode_t) -> bool {
    let ignored = libc::O_CLOEXEC | libc::O_LARGEFILE;
    flags & !ignored == libc::O_RDWR | libc::O_EXCL | libc::O_TMPFILE && mode == 0o700
}

/// Asks `/dev/anon` for a new anonymous file.
fn new_file(cloexec: bool) -> Result<c_int, Error> {
    let arg = DevanonNew {
        flags: if cloexec { DEVANON_CLOEXEC } else { 0 },
        reserved: 0,
    };
    // SAFETY: the path is a C string; the ioctl reads `arg`, which lives across the call.
    unsafe {
        let device = libc::openat64(
            libc::AT_FDCWD,
            DEVICE.as_ptr(),
            libc::O_RDWR | libc::O_CLOEXEC,
        );
        if device < 0 {
            return Err(Error::last_os_error());
        }
        let file = libc::ioctl(device, DEVANON_IOC_NEW, &raw const arg);
        let error = Error::last_os_error();
        libc::close(device);
        if file < 0 { Err(error) } else { Ok(file) }
    }
}

/// Finds the size of the program's image in memory, by the first call, the program itself.
extern "C" fn image_size(info: *mut libc::dl_phdr_info, _: usize, size: *mut c_void) -> c_int {
    // SAFETY: `dl_iterate_phdr` passes a valid entry, whose headers are mapped, and our pointer.
    unsafe {
        let headers = std::slice::from_raw_parts((*info).dlpi_phdr, (*info).dlpi_phnum.into());
        let loads = headers.iter().filter(|h| h.p_type == libc::PT_LOAD);
        let start = loads.clone().map(|h| h.p_vaddr).min().unwrap_or(0);
        let end = loads.map(|h| h.p_vaddr + h.p_memsz).max().unwrap_or(0);
        *size.cast::<usize>() = (end - start) as usize;
    }
    1
}

/// Keeps the part of `file` mapped that stands for the program's own image.
///
/// UML writes its system call stub there with write(2) and never maps it itself; only its
/// guest's processes do. When the last of them exits, the page would be freed, and the next one
/// would run zeros. The first page of the image is an ELF header and no stub: leaving it out
/// keeps nothing of UML's one-page test files.
fn keep_image(file: c_int) -> Result<(), Error> {
    let mut size = 0usize;
    // SAFETY: the mapping is new, at an address nobody uses, and is never accessed. It is not
    // for children, which would each hold the page.
    unsafe {
        libc::dl_iterate_phdr(Some(image_size), (&raw mut size).cast());
        if size <= PAGE {
            return Ok(());
        }
        let size = size.next_multiple_of(PAGE) - PAGE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let at = libc::mmap64(
            ptr::null_mut(),
            size,
            libc::PROT_NONE,
            flags,
            file,
            PAGE as i64,
        );
        if at == libc::MAP_FAILED || libc::madvise(at, size, libc::MADV_DONTFORK) < 0 {
            return Err(Error::last_os_error());
        }
    }
    Ok(())
}

/// Tells `devanon-run`, if it is there, that UML has its memory file.
fn report() {
    // SAFETY: `getenv` gives null or a C string that stays while nobody changes the
    // environment; `stat` is written before it is read; one byte is sent.
    unsafe {
        let text = libc::getenv(REPORT_ENV.as_ptr());
        if text.is_null() {
            return;
        }
        let Ok(text) = CStr::from_ptr(text).to_str() else {
            return;
        };
        let Some((fd, inode)) = text.split_once(':') else {
            return;
        };
        let (Ok(fd), Ok(inode)) = (fd.parse::<c_int>(), inode.parse::<u64>()) else {
            return;
        };
        let mut stat: libc::stat64 = std::mem::zeroed();
        if libc::fstat64(fd, &raw mut stat) == 0
            && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK
            && stat.st_ino == inode
        {
            libc::send(
                fd,
                c"".as_ptr().cast(),
                1,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            );
        }
    }
}

fn memory_file(flags: c_int) -> c_int {
    // SAFETY: `__errno_location` is valid in every thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    let result = new_file(flags & libc::O_CLOEXEC != 0).and_then(|file| {
        keep_image(file).map(|()| file).inspect_err(|_| {
            // SAFETY: the descriptor is ours.
            unsafe { libc::close(file) };
        })
    });
    let (file, after) = match result {
        Ok(file) => {
            report();
            (file, before)
        }
        Err(error) => {
            let text = format!("devanon: no memory file from /dev/anon: {error}\n");
            // A closed stderr is no reason to fail in another way.
            let _ = std::io::stderr().write_all(text.as_bytes());
            (-1, error.raw_os_error().unwrap_or(libc::EIO))
        }
    };
    // SAFETY: as above.
    unsafe { *errno = after };
    file
}

/// open(2). The mode comes in a register whether the caller passed one or not; it is looked at
/// only with flags that need it, as the C library does.
///
/// # Safety
///
/// `path` must be a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    if is_memory_file(flags, mode) {
        return memory_file(flags);
    }
    // SAFETY: the caller's promise. In the C library open(2) is openat(2) from here too.
    unsafe { libc::openat(libc::AT_FDCWD, path, flags, mode) }
}

/// open(2) by its other name, the one Debian's `linux.uml` uses.
///
/// # Safety
///
/// `path` must be a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    if is_memory_file(flags, mode) {
        return memory_file(flags);
    }
    // SAFETY: as for `open`.
    unsafe { libc::openat64(libc::AT_FDCWD, path, flags, mode) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UML: c_int = libc::O_RDWR | libc::O_EXCL | libc::O_TMPFILE;

    #[test]
    fn only_the_memory_file() {
        assert!(is_memory_file(UML | libc::O_CLOEXEC, 0o700));
        assert!(is_memory_file(UML, 0o700));
        // One that could get a name by linkat(2), and one of another mode.
        assert!(!is_memory_file(UML & !libc::O_EXCL, 0o700));
        assert!(!is_memory_file(UML, 0o600));
        // O_TMPFILE has the bit of O_DIRECTORY in it.
        assert!(!is_memory_file(
            libc::O_RDWR | libc::O_EXCL | libc::O_DIRECTORY,
            0o700
        ));
        assert!(!is_memory_file(
            libc::O_RDWR | libc::O_EXCL | libc::O_CREAT,
            0o700
        ));
    }
}
