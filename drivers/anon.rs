// SPDX-License-Identifier: GPL-2.0

//! `/dev/anon`: anonymous pages that go back to the host when unmapped.
//!
//! The safe side (`drivers/` out of tree): the driver's policy. No unsafe code.
//!
//! A page of the device exists from its first touch until the last mapping that covers it goes
//! away. Then the page, resident or swapped out, is freed, and its data is lost; a later touch
//! finds zeros. This suits the physical memory of a User-Mode Linux guest. It does not suit a
//! filesystem.
//!
//! The life of a page, in the order of this file: the device is mapped, and a file of anonymous
//! memory is made for it ([`DevAnon::new_backing`]); the mapping becomes one of that file
//! ([`DevAnon::mmap`]); a touch brings in a page ([`FreeOnUnmap::fault`]); a mapping goes away, and
//! the pages that nothing else maps are freed ([`FreeOnUnmap::close`]). [`DevAnon::ioctl`] is
//! another way to get such files.
//!
//! # Examples
//!
//! ```c
//! #include <fcntl.h>
//! #include <sys/mman.h>
//!
//! int main(void)
//! {
//!     int fd = open("/dev/anon", O_RDWR);
//!     char *p = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
//!
//!     p[0] = 1;               /* the host pays for one page */
//!     munmap(p, 1 << 20);     /* the host no longer pays for it */
//!     return 0;
//! }
//! ```

use chrdev::{
    CharDevice,
    Registration, //
};
use core::borrow::Borrow;
use freeing::PageFreer;
use kernel::{
    fs::file::{
        flags::O_CLOEXEC,
        FileDescriptorReservation, //
    },
    ioctl::_IOW,
    prelude::*,
    seq_file::SeqFile,
    sync::aref::ARef,
    uaccess::{
        UserPtr,
        UserSlice, //
    },
};
use range::{
    ranges_to_free,
    PageRange, //
};
use shmem::{
    ShmemFile,
    VmFault,
    VmOperations, //
};
use vma::NewVma;

mod range;

// The unsafe side. Out of tree it is `../rust`, so that the two sides can be told apart by their
// path. In tree, kbuild wants a driver in one directory: `scripts/host-patches` puts both sides
// there and removes the `#[path]` lines.
#[path = "../rust/bindings.rs"]
mod bindings;
#[path = "../rust/chrdev.rs"]
mod chrdev;
#[path = "../rust/freeing.rs"]
mod freeing;
#[path = "../rust/mapping.rs"]
mod mapping;
#[path = "../rust/shmem.rs"]
mod shmem;
#[path = "../rust/vma.rs"]
mod vma;

module! {
    type: Module,
    name: "devanon",
    authors: ["The devanon founders"],
    description: "/dev/anon: anonymous pages that are freed when unmapped",
    license: "GPL",
    params: {
        mode: u16 {
            default: 0o666,
            description: "permissions of the node /dev/anon (default 0666)",
        },
    },
}

/// 1:10 has been the number of this device since the User-Mode Linux patches for Linux 2.4.
const MAJOR: u32 = 1;
const MINOR: u32 = 10;

struct Module {
    _device: Registration<DevAnon>,
}

impl kernel::Module for Module {
    fn init(module: &'static ThisModule) -> Result<Self> {
        if DevAnon::mode() & !0o777 != 0 {
            pr_err!("mode must be between 0 and 0777\n");
            return Err(EINVAL);
        }

        shmem::init::<FreeOnUnmap>(module)?;
        Ok(Self {
            _device: Registration::new(module, MAJOR, MINOR)?,
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        shmem::exit();
    }
}

/// The device.
struct DevAnon;

impl CharDevice for DevAnon {
    /// Every open has memory of its own, which dup, fork and `SCM_RIGHTS` share. Created on first
    /// mmap, so merely opening the device costs nothing more.
    type Backing = ShmemFile;

    const CLASS: &'static CStr = c"devanon";
    const NAME: &'static CStr = c"anon";

    fn mode() -> u16 {
        // `value()` returns a `u16` from Linux 7.3 on, and a `&u16` before.
        *Borrow::<u16>::borrow(&module_parameters::mode.value())
    }

    fn new_backing() -> Result<ARef<ShmemFile>> {
        ShmemFile::new_unlimited()
    }

    fn mmap(file: &ShmemFile, vma: &NewVma) -> Result {
        file.map(vma)
    }

    /// `DEVANON_IOC_NEW` of `include/uapi/linux/devanon.h`.
    fn ioctl(cmd: u32, arg: usize) -> Result<c_long> {
        const DEVANON_IOC_NEW: u32 = _IOW::<bindings::devanon_new>(0xDA, 0x01);

        if cmd != DEVANON_IOC_NEW {
            return Err(ENOTTY);
        }

        let mut reader =
            UserSlice::new(UserPtr::from_addr(arg), size_of::<bindings::devanon_new>()).reader();
        let flags: u32 = reader.read()?;
        let reserved: u32 = reader.read()?;
        if flags & !bindings::DEVANON_CLOEXEC != 0 || reserved != 0 {
            return Err(EINVAL);
        }

        let cloexec = if flags & bindings::DEVANON_CLOEXEC != 0 {
            O_CLOEXEC
        } else {
            0
        };
        let fd = FileDescriptorReservation::get_unused_fd_flags(cloexec)?;
        let number = fd.reserved_fd();
        fd.fd_install(ShmemFile::new_seekable()?);
        Ok(number as c_long)
    }

    fn show_fdinfo(file: Option<&ShmemFile>, m: &SeqFile) {
        match file {
            Some(file) => file.show_fdinfo(m),
            None => shmem::show_fdinfo_without_file(m),
        }
    }
}

/// The rule: a page is freed when the last mapping that covers it goes away.
///
/// The kernel knows which VMAs cover which pages of a file, by the file's `i_mmap` tree. A VMA has
/// left the tree by the time it is closed, so the pages to free are the closed range minus what the
/// tree still covers. Nothing is counted, so nothing can be miscounted at fork, split, merge,
/// mremap or exit.
///
/// Between "no VMA covers this page" and "the page is freed", another process may map the page and
/// write to it. Freeing it then would lose live data. So coverage is rechecked under the folio
/// lock, which a mapper of the folio takes as well ([`PageFreer::free_contained`]). Two cases have
/// no such recheck: a page in swap, which has no folio, and a partly unmapped huge folio that is
/// pinned, whose uncovered pages are zeroed. There `invalidate_lock` keeps faults out.
///
/// A fault takes that lock only if it finds the lock taken. The closer takes the lock before
/// querying the tree and holds it until done. A VMA it missed entered the tree later, so the faults
/// of that VMA see the lock held. A VMA it found keeps its pages.
struct FreeOnUnmap;

impl VmOperations for FreeOnUnmap {
    fn must_wait(file: &ShmemFile) -> bool {
        file.mapping().is_invalidate_locked()
    }

    fn fault(file: &ShmemFile, shmem_fault: impl FnOnce() -> VmFault) -> VmFault {
        let _no_freeing = file.mapping().invalidate_lock_shared();

        shmem_fault()
    }

    fn close(file: &ShmemFile, closed: PageRange) {
        let mapping = file.mapping();
        let no_faults = mapping.invalidate_lock();
        let freer = PageFreer::new(&no_faults);
        let before = mapping.page_counts();

        // When a process exits, all its VMAs leave the tree before the first is closed. If all
        // pages came from mappings, a close also frees the uncovered pages behind it in the file.
        let uncovered = |range| {
            ranges_to_free(
                range,
                |part| freer.next_page(part),
                |part| {
                    if file.is_only_mapped() {
                        freer.coverage_beyond(part)
                    } else {
                        freer.coverage(part)
                    }
                },
            )
        };
        let Some(straddling) = uncovered(closed)
            .map(|range| freer.free_contained(range))
            .reduce(|any, straddling| any || straddling)
        else {
            return;
        };
        if straddling {
            // A folio left beyond `closed` is freed when its own range is closed.
            //
            // A huge folio that could not be split when a part of it lost its last mapping, because
            // it was pinned for example, is freed with its last part: hence the widening. In other
            // files, pages beside the closed ones may have been written and never mapped. Those
            // stay.
            let closed = if file.is_only_mapped() {
                freer.widen_to_folios(closed)
            } else {
                closed
            };
            for range in uncovered(closed) {
                freer.free_splitting(range);
            }
        }

        let after = mapping.page_counts();
        file.add_freed(before.total().saturating_sub(after.total()));
        file.recount();
    }
}
