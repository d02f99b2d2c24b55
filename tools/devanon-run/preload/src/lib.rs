// SPDX-License-Identifier: GPL-2.0

//! Preloaded into User-Mode Linux, this library intercepts one open: the one that creates the
//! file behind the guest's memory. It returns an anonymous file of `/dev/anon` instead.
//!
//! UML opens `O_TMPFILE | O_EXCL | O_RDWR`, mode 0700, in a temporary directory: a file that
//! has no name and can never get one. A file of `/dev/anon` has no name either. Every other
//! open is passed to the C library unchanged.
//!
//! `devanon-run` sets this up. Without it: `LD_PRELOAD=/path/libdevanon_preload.so linux.uml ...`.

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

/// Names the socket on which to report that UML has its memory file, as `<descriptor>:<inode>`.
/// The inode guards against the descriptor having been closed and its number reused.
const REPORT_ENV: &CStr = c"DEVANON_RUN_REPORT";

const PAGE: usize = 4096;

/// Returns true for the arguments that UML's `make_tempfile()` uses. Older UMLs omit `O_CLOEXEC`.
fn is_memory_file(flags: c_int, mode: libc::mode_t) -> bool {
    let ignored = libc::O_CLOEXEC | libc::O_LARGEFILE;
    flags & !ignored == libc::O_RDWR | libc::O_EXCL | libc::O_TMPFILE && mode == 0o700
}

/// Creates an anonymous file on `/dev/anon`.
fn new_file(cloexec: bool) -> Result<c_int, Error> {
    let arg = DevanonNew {
        flags: if cloexec { DEVANON_CLOEXEC } else { 0 },
        reserved: 0,
    };
    // SAFETY: the path is a C string; the ioctl reads `arg`, which outlives the call.
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

/// Stores the in-memory size of the program's image. The first entry is the program itself, so
/// this stops the iteration there.
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

/// Keeps a mapping of the part of `file` that corresponds to the program's own image.
///
/// UML writes its system call stub there with write(2) and never maps it itself; only the
/// guest's processes do. When the last of them exits, the page would be freed, and the next
/// process would execute zeros. The first page of the image holds the ELF header, never the stub.
/// Leaving it out means that UML's one-page test files are not pinned.
fn keep_image(file: c_int) -> Result<(), Error> {
    let mut size = 0usize;
    // SAFETY: the mapping is new, at an unused address, and is never accessed. Children do not
    // inherit it: each of them would keep the page.
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

/// Tells `devanon-run`, if it started this process, that UML has its memory file.
fn report() {
    // SAFETY: `getenv` returns null or a C string that is valid until the environment changes;
    // `stat` is written before it is read; one byte is sent.
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
            let text = format!("devanon: cannot get a memory file from /dev/anon: {error}\n");
            // A closed stderr must not change the error.
            let _ = std::io::stderr().write_all(text.as_bytes());
            (-1, error.raw_os_error().unwrap_or(libc::EIO))
        }
    };
    // SAFETY: as above.
    unsafe { *errno = after };
    file
}

/// open(2). The mode argument arrives in a register even if the caller passed none. As in the C
/// library, it is used only with flags that require a mode.
///
/// # Safety
///
/// `path` must be a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    if is_memory_file(flags, mode) {
        return memory_file(flags);
    }
    // SAFETY: the caller upholds it. The C library implements open(2) by openat(2) as well.
    unsafe { libc::openat(libc::AT_FDCWD, path, flags, mode) }
}

/// open64(), which Debian's `linux.uml` calls.
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
        // A file that linkat(2) could name, and one with another mode.
        assert!(!is_memory_file(UML & !libc::O_EXCL, 0o700));
        assert!(!is_memory_file(UML, 0o600));
        // O_TMPFILE includes the O_DIRECTORY bit.
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
