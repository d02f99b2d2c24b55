// SPDX-License-Identifier: GPL-2.0

//! Shmem files whose operations a driver can wrap.
//!
//! The unsafe side (`rust/` out of tree): the kernel crate wraps neither `file_operations` nor
//! `vm_operations_struct`, so their callbacks and raw pointers are handled here.
//!
//! A [`ShmemFile`] is a file of the kernel's internal tmpfs mount, and has all that shmem does for
//! its files. The driver's [`VmOperations`] wrap the three VMA operations that matter to it.
//! shmem's own operation tables are not exported: [`init`] makes one file, copies the tables that
//! shmem gave it, and puts the wrappers into the copies, which are read-only once the module is
//! loaded.
//!
//! # Lifetimes
//!
//! A VMA holds its file, and a file holds this module through `f_op->owner`, so no file or VMA
//! outlives the module. An inode can: an `O_PATH` descriptor holds the inode but none of our files.
//! The inode's `i_fop` is ours while any of our files is open on it. Reopening the inode through
//! `/proc/PID/fd` then gives a file that keeps the rule. The last file puts shmem's `i_fop` back.
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

/// The name of the files in `/proc/PID/maps`, where the kernel puts a slash before it.
const NAME: &CStr = c"dev/anon";

/// One more than the last page a file can have: `MAX_LFS_FILESIZE` in pages.
const MAX_PAGES: usize = 1 << (usize::BITS - 1 - PAGE_SHIFT as u32);

/// A bit set of `VM_FAULT_*`, as returned by fault handlers; 0 means "done".
pub(crate) type VmFault = bindings::vm_fault_t;

/// A driver's wrappers around shmem's `vm_operations_struct`.
pub(crate) trait VmOperations {
    /// A mapping of the pages `range` of `file` goes away. It has left the `i_mmap` tree.
    ///
    /// Called in process context, with `mmap_lock` held unless the process is exiting. May sleep.
    fn close(file: &ShmemFile, range: PageRange);

    /// Returns true if a fault has to go through [`Self::fault`]. Otherwise shmem handles it
    /// directly. Called at every fault, so it should be fast. Must not sleep.
    fn must_wait(file: &ShmemFile) -> bool;

    /// An unmapped page is touched. `shmem_fault` brings it in.
    ///
    /// Called in process context, with `mmap_lock` or the VMA's lock held for reading, which
    /// `shmem_fault` may drop. May sleep.
    fn fault(file: &ShmemFile, shmem_fault: impl FnOnce() -> VmFault) -> VmFault;
}

/// shmem's operations, and our copies of them with the wrappers.
struct WrappedOps {
    shmem_fops: *const bindings::file_operations,
    shmem_vm_ops: *const bindings::vm_operations_struct,
    fops: bindings::file_operations,
    vm_ops: bindings::vm_operations_struct,
}

// SAFETY: The fields are function pointers, and pointers to constants of the kernel that nobody
// writes through.
unsafe impl Send for WrappedOps {}
// SAFETY: Nobody writes to the fields, or through them, once they are set.
unsafe impl Sync for WrappedOps {}

/// Populated by [`init`] before the first file is made. Read-only once the module is initialised.
#[link_section = ".data..ro_after_init"]
static WRAPPED_OPS: SetOnce<WrappedOps> = SetOnce::new();

/// Wraps shmem's operations in those of `T`.
///
/// Must be called once, from the module's `init`. Fails with `EBUSY` if called again. May sleep.
pub(crate) fn init<T: VmOperations>(module: &ThisModule) -> Result {
    let file = new_shmem_file(0)?;
    let mut desc = bindings::vm_area_desc {
        file: file.as_ptr(),
        vm_file: file.as_ptr(),
        ..Default::default()
    };

    // SAFETY: The file is live, and `f_op` is constant in an open file.
    let shmem_fops = unsafe { (*file.as_ptr()).f_op };
    // SAFETY: `file` is a shmem file, so its `f_op` points to shmem's constant table.
    let fops = unsafe { ptr::read(shmem_fops) };
    let shmem_mmap_prepare = fops.mmap_prepare.ok_or(ENODEV)?;
    // SAFETY: shmem's `.mmap_prepare` reads the file and fills in the description.
    to_result(unsafe { shmem_mmap_prepare(&mut desc) })?;
    let shmem_vm_ops = NonNull::new(desc.vm_ops.cast_mut()).ok_or(ENODEV)?;
    // SAFETY: shmem filled in a pointer to a constant table.
    let vm_ops = unsafe { ptr::read(shmem_vm_ops.as_ptr()) };
    // The operations to wrap must exist, and those to replace must not.
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
            // shmem's insists that the file has shmem's operations. This one aligns for huge pages
            // as well, and mremap(2) accepts it for moving several VMAs at once.
            get_unmapped_area: Some(bindings::thp_get_unmapped_area),
            show_fdinfo: Some(show_fdinfo),
            ..fops
        },
        vm_ops: bindings::vm_operations_struct {
            close: Some(close::<T>),
            fault: Some(fault::<T>),
            map_pages: Some(map_pages::<T>),
            // userfaultfd would fill pages without calling `fault`: `close` could not keep it out.
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

/// Waits for every opener that read our `i_fop` before the last file put shmem's back.
///
/// Must be called from the module's exit, when none of our files is left. May sleep for long.
pub(crate) fn exit() {
    // `do_dentry_open()` reads `i_fop` and then takes a reference on its owner, without a lock but
    // also without sleeping in between. RCU tasks waits for such a section to end.
    //
    // SAFETY: Sleeping is allowed here, which is the only requirement.
    unsafe { bindings::devanon_synchronize_rcu_tasks() };
}

/// Makes a shmem file of `size` bytes, with shmem's own operations.
fn new_shmem_file(size: i64) -> Result<ARef<File>> {
    // SAFETY: `NAME` is a string of static lifetime.
    let file = unsafe { bindings::devanon_shmem_file_setup(NAME.as_char_ptr(), size) };
    // shmem reports a lack of memory for the inode as `ENOSPC`, but no disk is involved here.
    let file = from_err_ptr(file).map_err(|err| if err == ENOSPC { ENOMEM } else { err })?;
    let file = NonNull::new(file).ok_or(ENOMEM)?;

    // SAFETY: The file is new and the reference is ours. The file is in no descriptor table, so
    // nobody is inside `fdget_pos()` on it.
    Ok(unsafe { ARef::from_raw(file.cast()) })
}

/// A shmem file with our operations.
///
/// Not a [`File`], which promises that nobody is inside `fdget_pos()`: a `write(2)` whose buffer is
/// a mapping of the same file faults inside `fdget_pos()`. Nothing here uses `f_pos`.
///
/// # Invariants
///
/// `f_op` is [`WrappedOps::fops`], `f_inode` is a shmem inode, and the inode's [`InodeState`]
/// counts the file.
#[repr(transparent)]
pub(crate) struct ShmemFile(Opaque<bindings::file>);

// SAFETY: `get_file()` and `fput()` count references to the file, which lives until the last.
unsafe impl AlwaysRefCounted for ShmemFile {
    fn inc_ref(&self) {
        // SAFETY: A reference to `self` means that the count is not 0.
        unsafe { bindings::get_file(self.as_ptr()) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller gives up a reference.
        unsafe { bindings::fput(obj.as_ptr().cast()) }
    }
}

impl ShmemFile {
    /// Makes a file that is only to be mapped, as large as files can be. May sleep.
    pub(crate) fn new_unlimited() -> Result<ARef<Self>> {
        Self::new(i64::MAX, true)
    }

    /// Makes a file of size 0 for everything that regular files can do, like `memfd_create(2)`.
    ///
    /// May sleep.
    pub(crate) fn new_seekable() -> Result<ARef<File>> {
        let file = Self::new(0, false)?;

        // SAFETY: Nobody else has the file yet, so nobody else reads its modes.
        unsafe { bindings::devanon_file_set_seekable(file.as_ptr()) };
        // SAFETY: Both types are transparent over `struct file`, and the reference moves along.
        // Nobody else has the file, so nobody is inside `fdget_pos()` on it.
        Ok(unsafe { ARef::from_raw(ARef::into_raw(file).cast()) })
    }

    fn new(size: i64, only_mapped: bool) -> Result<ARef<Self>> {
        let ops = WRAPPED_OPS.as_ref().ok_or(ENXIO)?;
        let state = KBox::new(InodeState::new(only_mapped), GFP_KERNEL_ACCOUNT)?;
        let file = new_shmem_file(size)?;
        let raw = file.as_ptr();

        // SAFETY: We are called from a file operation of this module's device, which already holds
        // a reference to the module. The last `fput()` drops the one taken here, by way of
        // `f_op->owner`.
        unsafe { bindings::__module_get(ops.fops.owner) };
        // SAFETY: The file, its dentry and its inode are new: nobody else accesses these fields.
        unsafe {
            *state_slot(raw) = KBox::into_raw(state).cast();
            (*(*raw).f_inode).__bindgen_anon_3.i_fop = &ops.fops;
            (*raw).f_op = &ops.fops;
        }
        // INVARIANT: `f_op` was set above, and a new state counts one file.
        // SAFETY: Both types are transparent over `struct file`, and the reference moves along.
        Ok(unsafe { ARef::from_raw(ARef::into_raw(file).cast()) })
    }

    /// # Safety
    ///
    /// `ptr` must be a file that has our operations, is counted, and is referenced for `'a`.
    unsafe fn from_raw<'a>(ptr: *mut bindings::file) -> &'a Self {
        // SAFETY: `Self` is transparent over `struct file`.
        // INVARIANT: The caller vouches for it; only files of shmem inodes have our operations.
        unsafe { &*ptr.cast() }
    }

    fn as_ptr(&self) -> *mut bindings::file {
        self.0.get()
    }

    fn state(&self) -> &InodeState {
        // SAFETY: By the type invariant the state counts this file, so it lives as long as the
        // file. All its fields are atomics.
        unsafe { &*(*state_slot(self.as_ptr())).cast() }
    }

    /// The file's page cache.
    pub(crate) fn mapping(&self) -> &Mapping {
        // SAFETY: By the type invariant the inode is a shmem inode, and the file holds it.
        unsafe { Mapping::from_raw((*self.as_ptr()).f_mapping) }
    }

    /// Turns `vma`, which is being mapped for another file, into a mapping of this one.
    ///
    /// Fails with `EOVERFLOW` if it extends beyond the largest possible file.
    #[cfg(not(devanon_mmap_prepare))]
    pub(crate) fn map(&self, vma: &NewVma) -> Result {
        let vma = vma.as_ptr();

        // SAFETY: A `NewVma` is a live VMA.
        if unsafe { vma_range(vma) }.is_none_or(|range| range.last() >= MAX_PAGES) {
            return Err(EOVERFLOW);
        }

        // SAFETY: A `NewVma` is under `mmap_lock` held for writing and not in use yet, as
        // `vma_set_file()` requires. It swaps the VMA's reference to its file for one to ours.
        unsafe { bindings::vma_set_file(vma, self.as_ptr()) };
        // SAFETY: A `NewVma` is a live VMA in a call of `.mmap`. `compat_vma_mmap()` is meant to be
        // called from there, for a file that has `.mmap_prepare`.
        to_result(unsafe { bindings::compat_vma_mmap(self.as_ptr(), vma) })
    }

    /// Turns `vma`, which is not allocated yet, into a mapping of this file.
    ///
    /// Fails with `EOVERFLOW` if it extends beyond the largest possible file.
    #[cfg(devanon_mmap_prepare)]
    pub(crate) fn map(&self, vma: &NewVma) -> Result {
        // SAFETY: By the type invariant the description is ours to read and change in this call.
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
        // SAFETY: The description is now that of a mapping of this file, which has our operations.
        let ret = unsafe { mmap_prepare(desc) };
        desc.file = device;
        to_result(ret)?;
        // The mm drops this reference with the VMA, or at once if it makes none.
        desc.vm_file = ARef::into_raw(ARef::from(self)).as_ptr().cast();
        Ok(())
    }

    /// Returns true if every page of the file came from a mapping, because no descriptor has ever
    /// existed to write one with. A true answer stays correct while `invalidate_lock` is held.
    pub(crate) fn is_only_mapped(&self) -> bool {
        self.state().only_mapped.load(Relaxed)
    }

    /// Adds `pages` to the count of pages freed because their last mapping went away.
    pub(crate) fn add_freed(&self, pages: usize) {
        self.state().freed.fetch_add(pages as u64, Relaxed);
    }

    /// Makes shmem recount the remaining pages and give back what it charged for the others. May
    /// sleep.
    ///
    /// Called under `mmap_lock` and `invalidate_lock`: shmem's `getattr` takes a spinlock of its
    /// own, and must not take `i_rwsem`.
    pub(crate) fn recount(&self) {
        // SAFETY: The file is a live shmem file. No spinlock is held.
        unsafe { bindings::devanon_shmem_recount(self.as_ptr()) };
    }

    /// Writes the lines of `/proc/PID/fdinfo/N`.
    pub(crate) fn show_fdinfo(&self, m: &SeqFile) {
        let mapping = self.mapping();
        let freed = self.state().freed.load(Relaxed);

        show_lines(m, mapping.size(), mapping.page_counts(), freed);
    }
}

/// The driver's state of an inode while any of our files is open on it.
///
/// `d_fsdata` of the inode's only dentry points here. shmem uses that field only for directory
/// entries.
struct InodeState {
    /// The number of our files. Changed under the inode's `i_lock`. The last file frees the state.
    files: Atomic<usize>,
    /// Pages freed so far because their last mapping went away.
    freed: Atomic<u64>,
    /// True if the file was made only to be mapped, and was never reopened.
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

/// The field that points to the [`InodeState`].
///
/// # Safety
///
/// `file` must be a live file of a shmem inode.
unsafe fn state_slot(file: *mut bindings::file) -> *mut *mut InodeState {
    // SAFETY: The file holds its dentry, and its path never changes.
    unsafe { (&raw mut (*(*file).__bindgen_anon_1.f_path.dentry).d_fsdata).cast() }
}

/// `f_op->open`: an inode of ours is reopened through `/proc`.
///
/// # Safety
///
/// `file` must be a file that has our operations, and that is being opened on the shmem inode
/// `inode`.
unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    let Some(ops) = WRAPPED_OPS.as_ref() else {
        return ENXIO.to_errno();
    };
    // SAFETY: `shmem_fops` points to a constant of the kernel.
    if let Some(shmem_open) = unsafe { (*ops.shmem_fops).open } {
        // SAFETY: The inode is a shmem inode, and the file is being opened on it.
        let ret = unsafe { shmem_open(inode, file) };
        if ret != 0 {
            return ret;
        }
    }

    // SAFETY: The file holds the inode. If the pointer to the state is not null under `i_lock`, the
    // state is live: `release` clears the pointer under the same lock, before it frees the state.
    unsafe {
        bindings::spin_lock(&raw mut (*inode).i_lock);
        let state = (*state_slot(file)).as_ref();
        if let Some(state) = state {
            state.files.fetch_add(1, Relaxed);
            state.only_mapped.store(false, Relaxed);
        }
        bindings::spin_unlock(&raw mut (*inode).i_lock);
        if state.is_none() {
            // The last file went away after this open had read `i_fop`.
            return ENXIO.to_errno();
        }
    }
    // SAFETY: The file has our operations, is held, and has just been counted.
    let file = unsafe { ShmemFile::from_raw(file) };
    // A closer that saw `only_mapped` still set finishes before anything can be written.
    drop(file.mapping().invalidate_lock());
    0
}

/// `f_op->release`: a file of ours goes away.
///
/// # Safety
///
/// `file` must be a file of `inode` that has our operations, is counted, and is not used after
/// this.
unsafe extern "C" fn release(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    let Some(ops) = WRAPPED_OPS.as_ref() else {
        return 0;
    };

    // SAFETY: This file is still counted, so the state is live. `i_lock` orders the changes of
    // count, pointer and `i_fop` against `open`, and against `release` of other files.
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
        // SAFETY: The state came from `KBox::into_raw`. The pointer to it is cleared and no file is
        // left, so nobody can find it any more.
        drop(unsafe { KBox::from_raw(state) });
    }
    0
}

/// `f_op->mmap_prepare`: calls shmem's, then replaces its `vm_ops` by ours.
///
/// # Safety
///
/// `desc` must be the description, valid and ours during the call, of a mapping of a file that has
/// our operations.
unsafe extern "C" fn mmap_prepare(desc: *mut bindings::vm_area_desc) -> c_int {
    let Some(ops) = WRAPPED_OPS.as_ref() else {
        return ENXIO.to_errno();
    };
    // SAFETY: `shmem_fops` points to a constant of the kernel.
    let Some(shmem_mmap_prepare) = (unsafe { (*ops.shmem_fops).mmap_prepare }) else {
        return ENODEV.to_errno();
    };

    // SAFETY: The caller vouches for the description. Its file is that of a shmem inode.
    let ret = unsafe { shmem_mmap_prepare(desc) };
    if ret == 0 {
        // SAFETY: The description is ours to change during this call.
        unsafe { (*desc).vm_ops = &ops.vm_ops };
    }
    ret
}

/// `f_op->show_fdinfo`.
///
/// # Safety
///
/// `file` must be a counted file that has our operations, and `m` a seq_file that nobody else uses.
/// Both must stay valid during the call.
unsafe extern "C" fn show_fdinfo(m: *mut bindings::seq_file, file: *mut bindings::file) {
    // SAFETY: The caller vouches for both the file and `m`.
    unsafe { ShmemFile::from_raw(file).show_fdinfo(SeqFile::from_raw(m)) }
}

/// Writes the lines of `/proc/PID/fdinfo/N` before [`ShmemFile::new_unlimited`] has made a file.
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
/// `vma` must be live, and must not change during the call.
unsafe fn vma_range(vma: *mut bindings::vm_area_struct) -> Option<PageRange> {
    let (mut first, mut last) = (0, 0);

    // SAFETY: The caller vouches for the VMA, and the results are ours to write.
    unsafe { bindings::devanon_vma_range(vma, &mut first, &mut last) };
    PageRange::new(first, last)
}

/// `vm_ops->close`.
///
/// # Safety
///
/// `vma` must have our operations, have left its file's `i_mmap` tree, and not be used by anybody
/// else during the call.
unsafe extern "C" fn close<T: VmOperations>(vma: *mut bindings::vm_area_struct) {
    // SAFETY: Nobody else uses the VMA. It still holds its file, which has our operations because
    // the VMA has them.
    let (file, range) = unsafe { (ShmemFile::from_raw((*vma).vm_file), vma_range(vma)) };

    if let Some(range) = range {
        T::close(file, range);
    }
}

/// `vm_ops->fault`.
///
/// # Safety
///
/// `vmf` must describe a fault of a VMA that has our operations, under a lock that keeps the VMA.
unsafe extern "C" fn fault<T: VmOperations>(vmf: *mut bindings::vm_fault) -> VmFault {
    // SAFETY: The caller vouches for `vmf`. A lock keeps the VMA for now, and the VMA its file.
    let (file, shmem_vm_ops) = unsafe {
        let file = (*(*vmf).__bindgen_anon_1.vma).vm_file;
        (file, shmem_vm_ops(file))
    };
    let Some(shmem_fault) = shmem_vm_ops.fault else {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    };
    // SAFETY: This is shmem's handler for a VMA of a shmem file, called just as the mm called us.
    let shmem_fault = || unsafe { shmem_fault(vmf) };

    // SAFETY: The file has our operations, and the VMA holds it for now.
    if !T::must_wait(unsafe { ShmemFile::from_raw(file) }) {
        return shmem_fault();
    }
    // If a hole is being punched where we fault, shmem may drop the lock that keeps the VMA, and
    // with it the file. `T` locks the file around shmem, so it needs a reference of its own.
    //
    // SAFETY: The file has our operations. The VMA holds it, as shmem has not dropped the lock yet.
    let file = ARef::from(unsafe { ShmemFile::from_raw(file) });
    T::fault(&file, shmem_fault)
}

/// `vm_ops->map_pages`.
///
/// # Safety
///
/// `vmf` must describe a fault of a VMA that has our operations, under RCU and under a lock that
/// keeps the VMA.
unsafe extern "C" fn map_pages<T: VmOperations>(
    vmf: *mut bindings::vm_fault,
    first: c_ulong,
    last: c_ulong,
) -> VmFault {
    // SAFETY: The caller vouches for `vmf`. A lock keeps the VMA, and the VMA its file.
    let (file, shmem_vm_ops) = unsafe {
        let file = (*(*vmf).__bindgen_anon_1.vma).vm_file;
        (ShmemFile::from_raw(file), shmem_vm_ops(file))
    };
    let Some(shmem_map_pages) = shmem_vm_ops.map_pages else {
        return 0;
    };

    // If this maps nothing, the mm calls `fault` next.
    if T::must_wait(file) {
        return 0;
    }
    // SAFETY: This is shmem's handler for a VMA of a shmem file, called just as the mm called us.
    unsafe { shmem_map_pages(vmf, first, last) }
}

/// shmem's own `vm_operations_struct`.
///
/// # Safety
///
/// `file` must be live and have our operations.
unsafe fn shmem_vm_ops(file: *mut bindings::file) -> &'static bindings::vm_operations_struct {
    // SAFETY: The file's operations are embedded in `WRAPPED_OPS`, the only `WrappedOps`, which is
    // not written again. (A VMA's operations need not be: a filesystem that passes its mappings on
    // to our file may copy them.) `shmem_vm_ops` points to a constant of the kernel.
    unsafe { &*(*container_of!((*file).f_op, WrappedOps, fops)).shmem_vm_ops }
}
