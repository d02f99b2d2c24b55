// SPDX-License-Identifier: GPL-2.0

//! Shmem files whose operations a driver may wrap.
//!
//! A [`ShmemFile`] is a file of the kernel's internal tmpfs mount. It keeps all that shmem does for
//! its files; the driver's [`VmOperations`] stand around the three that matter to it. shmem's own
//! tables are not exported: [`init`] makes one file, copies what shmem gave it, and puts the
//! wrappers into the copies. The copies live in memory that is read-only once the module is loaded.
//!
//! # Lifetimes
//!
//! A VMA holds its file, and a file holds this module through `f_op->owner`, so no operation of a
//! file or a VMA outlives the module. An inode can: an `O_PATH` descriptor holds one and no file.
//! Its `i_fop` is ours as long as one of our files is open on it, so that opening it again, through
//! `/proc/PID/fd`, gives a file that keeps the rule; the last of them puts back shmem's.
//!
//! C headers: [`include/linux/shmem_fs.h`](srctree/include/linux/shmem_fs.h),
//! [`include/linux/mm.h`](srctree/include/linux/mm.h).

use super::{
    bindings,
    mapping::{
        Mapping,
        PageCounts, //
    },
    range::PageRange,
    vma::NewVma, //
};
use core::ptr::{
    self,
    NonNull, //
};
use kernel::{
    container_of,
    error::{
        from_err_ptr,
        to_result, //
    },
    fs::File,
    page::PAGE_SHIFT,
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    sync::{
        aref::{
            ARef,
            AlwaysRefCounted, //
        },
        atomic::{
            ordering::Relaxed,
            Atomic, //
        },
        SetOnce, //
    },
    types::Opaque,
    ThisModule, //
};

/// Name of the files, as `/proc/PID/maps` shows it (the kernel puts a slash before it).
const NAME: &CStr = c"dev/anon";

/// One more than the last page a file can have: `MAX_LFS_FILESIZE` in pages.
const MAX_PAGES: usize = 1 << (usize::BITS - 1 - PAGE_SHIFT as u32);

/// A bit set of `VM_FAULT_*`, as fault handlers return it; 0 is "done".
pub(crate) type VmFault = bindings::vm_fault_t;

/// What a driver does around shmem's own `vm_operations_struct`.
pub(crate) trait VmOperations {
    /// A mapping of the pages `range` of `file` went away; it has left the `i_mmap` tree.
    ///
    /// Process context, `mmap_lock` held unless the process is exiting; may sleep.
    fn close(file: &ShmemFile, range: PageRange);

    /// Whether pages are to be brought in by [`Self::fault`]; if not, shmem does so with no more
    /// ado. Asked at each fault, so it is to be quick. Must not sleep.
    fn must_wait(file: &ShmemFile) -> bool;

    /// A page is touched that is not mapped; `shmem_fault` brings it in.
    ///
    /// Process context, `mmap_lock` or the lock of the VMA held for reading; may sleep.
    /// `shmem_fault` may drop that lock.
    fn fault(file: &ShmemFile, shmem_fault: impl FnOnce() -> VmFault) -> VmFault;
}

/// shmem's operations and ours.
struct WrappedOps {
    shmem_fops: *const bindings::file_operations,
    shmem_vm_ops: *const bindings::vm_operations_struct,
    fops: bindings::file_operations,
    vm_ops: bindings::vm_operations_struct,
}

// SAFETY: Function pointers, and pointers to constants of the kernel; nobody writes through them.
unsafe impl Send for WrappedOps {}
// SAFETY: As above.
unsafe impl Sync for WrappedOps {}

/// Populated by [`init`], before the first file is made, and read-only from the end of the
/// module's initialisation on.
#[link_section = ".data..ro_after_init"]
static WRAPPED_OPS: SetOnce<WrappedOps> = SetOnce::new();

/// Makes the tables of operations, with `T` around shmem's.
///
/// To be called once, from the module's `init`; may sleep. Fails with `EBUSY` if called again.
pub(crate) fn init<T: VmOperations>(module: &ThisModule) -> Result {
    let file = new_shmem_file(0)?;
    let mut desc = bindings::vm_area_desc {
        file: file.as_ptr(),
        vm_file: file.as_ptr(),
        ..Default::default()
    };

    // SAFETY: `file` is a shmem file, so its `f_op` is shmem's constant table.
    let shmem_fops = unsafe { (*file.as_ptr()).f_op };
    // SAFETY: As above.
    let fops = unsafe { ptr::read(shmem_fops) };
    let shmem_mmap_prepare = fops.mmap_prepare.ok_or(ENODEV)?;
    // SAFETY: `.mmap_prepare` of shmem reads the file and fills in the description.
    to_result(unsafe { shmem_mmap_prepare(&mut desc) })?;
    let shmem_vm_ops = NonNull::new(desc.vm_ops.cast_mut()).ok_or(ENODEV)?;
    // SAFETY: shmem filled in a pointer to a constant table.
    let vm_ops = unsafe { ptr::read(shmem_vm_ops.as_ptr()) };
    // What is wrapped has to be there, and what is replaced must not.
    if vm_ops.fault.is_none()
        || vm_ops.map_pages.is_none()
        || vm_ops.close.is_some()
        || fops.release.is_some()
        || fops.show_fdinfo.is_some()
    {
        return Err(ENODEV);
    }

    let populated = WRAPPED_OPS.populate(WrappedOps {
        shmem_fops,
        shmem_vm_ops: shmem_vm_ops.as_ptr(),
        fops: bindings::file_operations {
            owner: module.as_ptr(),
            open: Some(open),
            release: Some(release),
            mmap_prepare: Some(mmap_prepare),
            // shmem's insists that a file has shmem's operations. This one aligns for huge pages
            // as well, and is one that mremap(2) trusts to move several VMAs at once.
            get_unmapped_area: Some(bindings::thp_get_unmapped_area),
            show_fdinfo: Some(show_fdinfo),
            ..fops
        },
        vm_ops: bindings::vm_operations_struct {
            close: Some(close::<T>),
            fault: Some(fault::<T>),
            map_pages: Some(map_pages::<T>),
            // userfaultfd would fill pages past `fault`, unseen by `close`.
            uffd_ops: ptr::null(),
            ..vm_ops
        },
    });
    if populated {
        Ok(())
    } else {
        Err(EBUSY)
    }
}

/// Waits until nobody uses an `i_fop` of ours that he read before the last file put back shmem's.
///
/// To be called from the module's exit, when no file of ours is left. May sleep, for long.
pub(crate) fn exit() {
    // `do_dentry_open()` reads `i_fop` and takes a reference on its owner right after, under no
    // lock. It does not sleep in between, which is what RCU tasks waits for.
    //
    // SAFETY: No requirement but that it may sleep here.
    unsafe { bindings::devanon_synchronize_rcu_tasks() };
}

/// A new shmem file of `size` bytes, with shmem's own operations.
fn new_shmem_file(size: i64) -> Result<ARef<File>> {
    // SAFETY: `NAME` is a string that lives for ever.
    let file = unsafe { bindings::devanon_shmem_file_setup(NAME.as_char_ptr(), size) };
    // No memory for an inode is `ENOSPC` to shmem, but nobody asked for room on a disk.
    let file = from_err_ptr(file).map_err(|err| if err == ENOSPC { ENOMEM } else { err })?;
    let file = NonNull::new(file).ok_or(ENOMEM)?;

    // SAFETY: The file is new and the reference is ours; it is in no descriptor table, so nobody is
    // inside `fdget_pos()` on it.
    Ok(unsafe { ARef::from_raw(file.cast()) })
}

/// A shmem file with our operations.
///
/// # Invariants
///
/// `f_op` is [`WrappedOps::fops`], `f_inode` is a shmem inode, and the file is one of those counted in
/// the inode's [`InodeState`].
///
/// Not a [`File`]: a fault may come inside `fdget_pos()`, when a `write(2)` reads its buffer from a
/// mapping of the same file, and `File` promises that there is none. Nothing here uses `f_pos`.
#[repr(transparent)]
pub(crate) struct ShmemFile(Opaque<bindings::file>);

// SAFETY: The reference count is the file's own.
unsafe impl AlwaysRefCounted for ShmemFile {
    fn inc_ref(&self) {
        // SAFETY: A reference to `self` proves that the count is not 0.
        unsafe { bindings::get_file(self.as_ptr()) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller gives up a reference.
        unsafe { bindings::fput(obj.as_ptr().cast()) }
    }
}

impl ShmemFile {
    /// A file for mapping only, as large as files can be. May sleep.
    pub(crate) fn new_unlimited() -> Result<ARef<Self>> {
        Self::new(i64::MAX, true)
    }

    /// A file of size 0 for all that regular files are for, like one of `memfd_create(2)`.
    ///
    /// May sleep.
    pub(crate) fn new_seekable() -> Result<ARef<File>> {
        let file = Self::new(0, false)?;

        // SAFETY: Nobody else has the file yet, so nobody else looks at its modes.
        unsafe { bindings::devanon_file_set_seekable(file.as_ptr()) };
        // SAFETY: Both are transparent over `struct file`; the reference is passed on. Nobody else
        // has the file, so nobody is inside `fdget_pos()` on it.
        Ok(unsafe { ARef::from_raw(ARef::into_raw(file).cast()) })
    }

    fn new(size: i64, only_mapped: bool) -> Result<ARef<Self>> {
        let ops = WRAPPED_OPS.as_ref().ok_or(ENXIO)?;
        let state = KBox::new(InodeState::new(only_mapped), GFP_KERNEL_ACCOUNT)?;
        let file = new_shmem_file(size)?;
        let raw = file.as_ptr();

        // SAFETY: We are called from a file operation of this module's device, which holds the
        // module, so there is a reference to add to. The last `fput()` drops it: it finds the
        // module in `f_op->owner`.
        unsafe { bindings::__module_get(ops.fops.owner) };
        // SAFETY: The file, its dentry and its inode are new: nobody else looks at these fields.
        unsafe {
            *state_slot(raw) = KBox::into_raw(state).cast();
            (*(*raw).f_inode).__bindgen_anon_3.i_fop = &ops.fops;
            (*raw).f_op = &ops.fops;
        }
        // INVARIANT: `f_op` was set above, and an object starts out with one file counted.
        // SAFETY: Both are transparent over `struct file`; the reference is passed on.
        Ok(unsafe { ARef::from_raw(ARef::into_raw(file).cast()) })
    }

    /// # Safety
    ///
    /// `ptr` has our operations, and is referenced for `'a`.
    unsafe fn from_raw<'a>(ptr: *mut bindings::file) -> &'a Self {
        // SAFETY: `Self` is transparent over `struct file`.
        // INVARIANT: Our operations are given to files of shmem inodes only, once they are counted.
        unsafe { &*ptr.cast() }
    }

    fn as_ptr(&self) -> *mut bindings::file {
        self.0.get()
    }

    fn state(&self) -> &InodeState {
        // SAFETY: By the type invariant this file is counted, so the object is there as long as the
        // file. Only atomics of it are written.
        unsafe { &*(*state_slot(self.as_ptr())).cast() }
    }

    /// The file's pages.
    pub(crate) fn mapping(&self) -> &Mapping {
        // SAFETY: By the type invariant the inode is one of shmem, and the file holds it.
        unsafe { Mapping::from_raw((*self.as_ptr()).f_mapping) }
    }

    /// Makes `vma`, which is being mapped for another file, a mapping of this one.
    ///
    /// Fails with `EOVERFLOW` if it goes beyond what a file can hold.
    #[cfg(not(devanon_mmap_prepare))]
    pub(crate) fn map(&self, vma: &NewVma) -> Result {
        let vma = vma.as_ptr();

        // SAFETY: A `NewVma` is a live VMA.
        if unsafe { vma_range(vma) }.is_none_or(|range| range.last() >= MAX_PAGES) {
            return Err(EOVERFLOW);
        }

        // SAFETY: A `NewVma` is under `mmap_lock` held for writing and seen by nobody else, as
        // `vma_set_file()` asks. It swaps the VMA's reference to its file for one to ours.
        unsafe { bindings::vma_set_file(vma, self.as_ptr()) };
        // SAFETY: As above; `compat_vma_mmap()` is there to be called from `.mmap`, for a file that
        // has `.mmap_prepare`.
        to_result(unsafe { bindings::compat_vma_mmap(self.as_ptr(), vma) })
    }

    /// The same, for a VMA that is not made yet.
    #[cfg(devanon_mmap_prepare)]
    pub(crate) fn map(&self, vma: &NewVma) -> Result {
        // SAFETY: By its type invariant the description is ours to read and change in this call.
        let desc = unsafe { &mut *vma.as_ptr() };
        let pages = (desc.end - desc.start) >> PAGE_SHIFT;

        if desc
            .pgoff
            .checked_add(pages)
            .is_none_or(|end| end > MAX_PAGES)
        {
            return Err(EOVERFLOW);
        }

        let device = core::mem::replace(&mut desc.file, self.as_ptr());
        // SAFETY: The description is now one for this file, which has our operations.
        let ret = unsafe { mmap_prepare(desc) };
        desc.file = device;
        to_result(ret)?;
        // The mm drops this reference with the VMA, or if none is made after all.
        desc.vm_file = ARef::into_raw(ARef::from(self)).as_ptr().cast();
        Ok(())
    }

    /// Whether every page there is came by a mapping: there was never a descriptor to write one
    /// with. Holds as long as `invalidate_lock` is held.
    pub(crate) fn is_only_mapped(&self) -> bool {
        self.state().only_mapped.load(Relaxed)
    }

    /// Counts `pages` pages as freed because their last mapping went away.
    pub(crate) fn add_freed(&self, pages: usize) {
        self.state().freed.fetch_add(pages as u64, Relaxed);
    }

    /// Has shmem count the pages that are left, and give back the rest of what it charged. May
    /// sleep.
    ///
    /// Under `mmap_lock` and `invalidate_lock`: shmem's `getattr` takes a spinlock of its own, and
    /// must not take `i_rwsem`.
    pub(crate) fn recount(&self) {
        // SAFETY: The file is live, and one of shmem. No spinlock is held.
        unsafe { bindings::devanon_shmem_recount(self.as_ptr()) };
    }

    /// Writes the lines of `/proc/PID/fdinfo/N`.
    pub(crate) fn show_fdinfo(&self, m: &SeqFile) {
        let mapping = self.mapping();
        let freed = self.state().freed.load(Relaxed);

        show_lines(m, mapping.size(), mapping.page_counts(), freed);
    }
}

/// What is kept for an inode of ours while files of ours are open on it.
///
/// The inode's only dentry points here, with `d_fsdata`, which shmem uses for entries of
/// directories only.
struct InodeState {
    /// The files. Changed under the inode's `i_lock`; the object goes with the last of them.
    files: Atomic<usize>,
    /// Pages freed because their last mapping went away, so far.
    freed: Atomic<u64>,
    /// The file was made for mapping only, and never opened again.
    only_mapped: Atomic<bool>,
}

impl InodeState {
    fn new(only_mapped: bool) -> Self {
        Self {
            files: Atomic::new(1),
            freed: Atomic::new(0),
            only_mapped: Atomic::new(only_mapped),
        }
    }
}

/// Where the pointer to the [`InodeState`] is.
///
/// # Safety
///
/// `file` is a file of a shmem inode.
unsafe fn state_slot(file: *mut bindings::file) -> *mut *mut InodeState {
    // SAFETY: A file holds its dentry. The path of a file never changes.
    unsafe { (&raw mut (*(*file).__bindgen_anon_1.f_path.dentry).d_fsdata).cast() }
}

/// `f_op->open`: somebody opens an inode of ours again, by way of `/proc`.
///
/// # Safety
///
/// Called by the VFS for a file that has our operations.
unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    let Some(ops) = WRAPPED_OPS.as_ref() else {
        return ENXIO.to_errno();
    };
    // SAFETY: `shmem_fops` is a constant of the kernel, and the inode is one of shmem.
    if let Some(shmem_open) = unsafe { (*ops.shmem_fops).open } {
        // SAFETY: As above.
        let ret = unsafe { shmem_open(inode, file) };
        if ret != 0 {
            return ret;
        }
    }

    // SAFETY: The inode is held by the file. Under `i_lock` the object, if the pointer is there, is
    // there as well: `release` takes both away under the same lock.
    unsafe {
        bindings::spin_lock(&raw mut (*inode).i_lock);
        let state = (*state_slot(file)).as_ref();
        if let Some(state) = state {
            state.files.fetch_add(1, Relaxed);
            state.only_mapped.store(false, Relaxed);
        }
        bindings::spin_unlock(&raw mut (*inode).i_lock);
        if state.is_none() {
            // The last file went away after `i_fop` was read for this one.
            return ENXIO.to_errno();
        }
    }
    // SAFETY: The file has our operations, is held, and is counted by now.
    let file = unsafe { ShmemFile::from_raw(file) };
    // Who frees pages and does not know yet is done before anything is written.
    drop(file.mapping().invalidate_lock());
    0
}

/// `f_op->release`: a file of ours goes away.
///
/// # Safety
///
/// Called by the VFS, once, for a file that has our operations and was opened.
unsafe extern "C" fn release(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    let Some(ops) = WRAPPED_OPS.as_ref() else {
        return 0;
    };

    // SAFETY: This file is still counted, so the object is there. `i_lock` orders the change of
    // count, pointer and `i_fop` against `open` and against other files' `release`.
    let last = unsafe {
        let slot = state_slot(file);
        let state = *slot;

        bindings::spin_lock(&raw mut (*inode).i_lock);
        let last = (*state).files.fetch_add(usize::MAX, Relaxed) == 1;
        if last {
            *slot = ptr::null_mut();
            (&raw mut (*inode).__bindgen_anon_3.i_fop).write_volatile(ops.shmem_fops);
        }
        bindings::spin_unlock(&raw mut (*inode).i_lock);
        last.then_some(state)
    };
    if let Some(state) = last {
        // SAFETY: It came from `KBox::into_raw`, and with the pointer gone and no file left nobody
        // can find it any more.
        drop(unsafe { KBox::from_raw(state) });
    }
    0
}

/// `f_op->mmap_prepare`: shmem's, then our `vm_ops` in place of its own.
///
/// # Safety
///
/// Called by the mm for a file that has our operations.
unsafe extern "C" fn mmap_prepare(desc: *mut bindings::vm_area_desc) -> c_int {
    let Some(ops) = WRAPPED_OPS.as_ref() else {
        return ENXIO.to_errno();
    };
    // SAFETY: `shmem_fops` is a constant of the kernel.
    let Some(shmem_mmap_prepare) = (unsafe { (*ops.shmem_fops).mmap_prepare }) else {
        return ENODEV.to_errno();
    };

    // SAFETY: The caller's description, for a file of a shmem inode.
    let ret = unsafe { shmem_mmap_prepare(desc) };
    if ret == 0 {
        // SAFETY: The description is ours to change in this call.
        unsafe { (*desc).vm_ops = &ops.vm_ops };
    }
    ret
}

/// `f_op->show_fdinfo`.
///
/// # Safety
///
/// Called by procfs for a file that has our operations, which it holds.
unsafe extern "C" fn show_fdinfo(m: *mut bindings::seq_file, file: *mut bindings::file) {
    // SAFETY: The file has our operations and is held; `m` is this call's alone.
    unsafe { ShmemFile::from_raw(file).show_fdinfo(SeqFile::from_raw(m)) }
}

/// The lines of `/proc/PID/fdinfo/N` where [`ShmemFile::new_unlimited`] was not called yet.
pub(crate) fn show_fdinfo_without_file(m: &SeqFile) {
    show_lines(m, i64::MAX as u64, PageCounts::default(), 0);
}

fn show_lines(m: &SeqFile, size: u64, pages: PageCounts, freed: u64) {
    seq_print!(m, "anon-size:\t{}\n", size);
    seq_print!(m, "anon-resident:\t{}\n", pages.resident);
    seq_print!(m, "anon-swapped:\t{}\n", pages.swapped);
    seq_print!(m, "anon-freed:\t{}\n", freed);
}

/// The pages of its file that a VMA covers.
///
/// # Safety
///
/// `vma` is live, and does not change during the call.
unsafe fn vma_range(vma: *mut bindings::vm_area_struct) -> Option<PageRange> {
    let (mut first, mut last) = (0, 0);

    // SAFETY: The caller's VMA, and results that are ours to write.
    unsafe { bindings::devanon_vma_range(vma, &mut first, &mut last) };
    PageRange::new(first, last)
}

/// `vm_ops->close`.
///
/// # Safety
///
/// Called by the mm for a VMA that has our operations, and has left its file's `i_mmap` tree.
unsafe extern "C" fn close<T: VmOperations>(vma: *mut bindings::vm_area_struct) {
    // SAFETY: A VMA on its way out belongs to its remover; it still holds its file, and it has our
    // operations because its file has.
    let (file, range) = unsafe { (ShmemFile::from_raw((*vma).vm_file), vma_range(vma)) };

    if let Some(range) = range {
        T::close(file, range);
    }
}

/// `vm_ops->fault`.
///
/// # Safety
///
/// Called by the mm for a VMA that has our operations, under a lock that keeps it.
unsafe extern "C" fn fault<T: VmOperations>(vmf: *mut bindings::vm_fault) -> VmFault {
    // SAFETY: `vmf` is the mm's, and its VMA is kept for now, which holds its file.
    let (file, shmem_vm_ops) = unsafe {
        let file = (*(*vmf).__bindgen_anon_1.vma).vm_file;
        (file, shmem_vm_ops(file))
    };
    let Some(shmem_fault) = shmem_vm_ops.fault else {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    };
    // SAFETY: shmem's handler, for a VMA of a shmem file, called as the mm called us.
    let shmem_fault = || unsafe { shmem_fault(vmf) };

    // SAFETY: The file has our operations, and is held for now.
    if !T::must_wait(unsafe { ShmemFile::from_raw(file) }) {
        return shmem_fault();
    }
    // shmem may drop the lock that keeps the VMA, and thereby the file: when a hole is being
    // punched where we fault. `T` locks the file around shmem, so it needs a reference of its own.
    //
    // SAFETY: As above.
    let file = ARef::from(unsafe { ShmemFile::from_raw(file) });
    T::fault(&file, shmem_fault)
}

/// `vm_ops->map_pages`.
///
/// # Safety
///
/// Called by the mm for a VMA that has our operations, under a lock that keeps it, and under RCU.
unsafe extern "C" fn map_pages<T: VmOperations>(
    vmf: *mut bindings::vm_fault,
    first: c_ulong,
    last: c_ulong,
) -> VmFault {
    // SAFETY: `vmf` is the mm's, and its VMA is kept, which holds its file.
    let (file, shmem_vm_ops) = unsafe {
        let file = (*(*vmf).__bindgen_anon_1.vma).vm_file;
        (ShmemFile::from_raw(file), shmem_vm_ops(file))
    };
    let Some(shmem_map_pages) = shmem_vm_ops.map_pages else {
        return 0;
    };

    // The mm calls `fault` next.
    if T::must_wait(file) {
        return 0;
    }
    // SAFETY: shmem's handler, for a VMA of a shmem file, called as the mm called us.
    unsafe { shmem_map_pages(vmf, first, last) }
}

/// shmem's own `vm_operations_struct`.
///
/// # Safety
///
/// `file` has our operations.
unsafe fn shmem_vm_ops(file: *mut bindings::file) -> &'static bindings::vm_operations_struct {
    // SAFETY: The file's operations are those in `WRAPPED_OPS`, of which there is one, and which is not
    // written again. (A VMA's need not be: a filesystem that passes its mappings on to our file may
    // copy them.) What they name as shmem's is a constant of the kernel.
    unsafe { &*(*container_of!((*file).f_op, WrappedOps, fops)).shmem_vm_ops }
}
