// SPDX-License-Identifier: GPL-2.0

//! A character device with a number of its own: cdev, class and node.
//!
//! C headers: [`include/linux/cdev.h`](srctree/include/linux/cdev.h),
//! [`include/linux/device/class.h`](srctree/include/linux/device/class.h).

use super::{
    bindings,
    vma::NewVma, //
};
use core::{
    marker::PhantomData,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    prelude::*,
    seq_file::SeqFile,
    sync::aref::{
        ARef,
        AlwaysRefCounted, //
    },
    ThisModule, //
};

/// A driver of a character device. Every method is called in process context and may sleep.
pub(crate) trait CharDevice {
    /// What an open file of the device refers to, from its first mapping on.
    type Backing: AlwaysRefCounted;

    /// Name of the class, in `/sys/class`.
    const CLASS: &'static CStr;

    /// Name of the device, in `/sys/class/CLASS` and `/dev`.
    const NAME: &'static CStr;

    /// Permissions of the node that devtmpfs makes.
    fn mode() -> u16;

    /// An open file is mapped for the first time, under `mmap_lock` held for writing. Where several
    /// do so at once, one object is kept. What a mapping with `MAP_FIXED` replaces is gone by then,
    /// even if this fails.
    fn new_backing() -> Result<ARef<Self::Backing>>;

    /// `mmap(2)`, under `mmap_lock` held for writing.
    fn mmap(backing: &Self::Backing, vma: &NewVma) -> Result;

    /// `ioctl(2)`.
    fn ioctl(cmd: u32, arg: usize) -> Result<c_long>;

    /// `/proc/PID/fdinfo/N` is read. There is no object before the first mapping.
    fn show_fdinfo(backing: Option<&Self::Backing>, m: &SeqFile);
}

/// A device in the kernel's tables, with a node in `/dev` where devtmpfs makes nodes.
///
/// # Invariants
///
/// `_cdev` is registered for `dev`, `class` is ours, and `class` has a device for `dev`.
pub(crate) struct Registration<T: CharDevice> {
    _cdev: Cdev,
    class: Class,
    dev: bindings::dev_t,
    _driver: PhantomData<T>,
}

// SAFETY: Registering and unregistering may happen on different threads.
unsafe impl<T: CharDevice> Send for Registration<T> {}
// SAFETY: There is no method that takes `&self`.
unsafe impl<T: CharDevice> Sync for Registration<T> {}

impl<T: CharDevice> Registration<T> {
    /// Registers the device `major`:`minor`. From then on it can be opened.
    ///
    /// Does not claim the number as `register_chrdev_region()` would: a narrower range wins over
    /// the wider one of another driver, so one minor of a major that is taken can be had.
    ///
    /// May sleep.
    pub(crate) fn new(module: &'static ThisModule, major: u32, minor: u32) -> Result<Self> {
        // `MKDEV()`.
        let dev = (major << 20) | minor;
        let class = Class::new::<T>()?;
        let cdev = Cdev::new::<T>(module, dev)?;

        // SAFETY: The class is registered; the name takes the place of a format's only `%s`.
        from_err_ptr(unsafe {
            bindings::device_create(
                class.0.as_ptr(),
                ptr::null_mut(),
                dev,
                ptr::null_mut(),
                c"%s".as_char_ptr(),
                T::NAME.as_char_ptr(),
            )
        })?;
        // INVARIANT: All three steps were done.
        Ok(Self {
            _cdev: cdev,
            class,
            dev,
            _driver: PhantomData,
        })
    }

    /// The object of an open file, if there is one. Takes `f_lock`.
    ///
    /// # Safety
    ///
    /// `file` is an open file of this device, and the caller keeps it for `'a`.
    unsafe fn backing<'a>(file: *mut bindings::file) -> Option<&'a T::Backing> {
        // SAFETY: The file is live. `private_data` is null in a new file, and set once, under
        // `f_lock`, to a reference that `release` gives up when nobody keeps the file any more.
        unsafe {
            bindings::spin_lock(&raw mut (*file).f_lock);
            let backing: *const T::Backing = (*file).private_data.cast();
            bindings::spin_unlock(&raw mut (*file).f_lock);
            backing.as_ref()
        }
    }

    /// The object of an open file: `new`, unless somebody was faster. Takes `f_lock`.
    ///
    /// # Safety
    ///
    /// As [`Self::backing`].
    unsafe fn backing_or_set<'a>(
        file: *mut bindings::file,
        new: ARef<T::Backing>,
    ) -> &'a T::Backing {
        // SAFETY: As in `backing`. What is in the slot in the end is no null pointer.
        unsafe {
            bindings::spin_lock(&raw mut (*file).f_lock);
            let slot = &raw mut (*file).private_data;
            let unused = if (*slot).is_null() {
                *slot = ARef::into_raw(new).as_ptr().cast();
                None
            } else {
                Some(new)
            };
            let backing: *const T::Backing = (*slot).cast();
            bindings::spin_unlock(&raw mut (*file).f_lock);
            drop(unused);
            &*backing
        }
    }

    /// # Safety
    ///
    /// As the mm calls `f_op->mmap` or `f_op->mmap_prepare`, for an open file of this device.
    unsafe fn map(file: *mut bindings::file, vma: &NewVma) -> Result {
        // SAFETY: The mm keeps the file during the call.
        if let Some(backing) = unsafe { Self::backing(file) } {
            return T::mmap(backing, vma);
        }
        let new = T::new_backing()?;
        // SAFETY: As above.
        T::mmap(unsafe { Self::backing_or_set(file, new) }, vma)
    }

    /// # Safety
    ///
    /// Called by the VFS, once, for a file of this device.
    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: A reference, if anything; nobody uses the file after this.
        unsafe {
            if let Some(backing) = NonNull::new((*file).private_data) {
                drop(ARef::<T::Backing>::from_raw(backing.cast()));
            }
        }
        0
    }

    /// # Safety
    ///
    /// Called by the mm for an open file of this device and a VMA being mapped.
    #[cfg(not(devanon_mmap_prepare))]
    unsafe extern "C" fn mmap(
        file: *mut bindings::file,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: As the caller promises.
        match unsafe { Self::map(file, NewVma::from_raw(vma)) } {
            Ok(()) => 0,
            Err(err) => err.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Called by the mm for an open file of this device that is being mapped.
    #[cfg(devanon_mmap_prepare)]
    unsafe extern "C" fn mmap_prepare(desc: *mut bindings::vm_area_desc) -> c_int {
        // SAFETY: As the caller promises; `file` is the one that was opened.
        match unsafe { Self::map((*desc).file, NewVma::from_raw(desc)) } {
            Ok(()) => 0,
            Err(err) => err.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Called by the VFS for an open file of this device.
    unsafe extern "C" fn ioctl(_file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
        match T::ioctl(cmd, arg) {
            Ok(ret) => ret,
            Err(err) => err.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// Called by procfs for an open file of this device.
    unsafe extern "C" fn show_fdinfo(m: *mut bindings::seq_file, file: *mut bindings::file) {
        // SAFETY: As the caller promises; `m` is this call's alone.
        unsafe { T::show_fdinfo(Self::backing(file), SeqFile::from_raw(m)) };
    }

    /// # Safety
    ///
    /// Called by the driver core for a device of our class; `mode` is null or points to the mode
    /// of the node to make.
    unsafe extern "C" fn devnode(
        _dev: *const bindings::device,
        mode: *mut bindings::umode_t,
    ) -> *mut c_char {
        if !mode.is_null() {
            // SAFETY: As the caller promises.
            unsafe { *mode = T::mode() };
        }
        ptr::null_mut()
    }

    const FOPS: bindings::file_operations = bindings::file_operations {
        owner: THIS_MODULE,
        release: Some(Self::release),
        #[cfg(not(devanon_mmap_prepare))]
        mmap: Some(Self::mmap),
        #[cfg(devanon_mmap_prepare)]
        mmap_prepare: Some(Self::mmap_prepare),
        get_unmapped_area: Some(bindings::thp_get_unmapped_area),
        unlocked_ioctl: Some(Self::ioctl),
        #[cfg(CONFIG_COMPAT)]
        compat_ioctl: bindings::compat_ptr_ioctl,
        show_fdinfo: Some(Self::show_fdinfo),
        ..pin_init::zeroed()
    };
}

impl<T: CharDevice> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the class is there, and has a device of this number. The
        // cdev and the class follow as the fields are dropped, in this order.
        unsafe { bindings::device_destroy(self.class.0.as_ptr(), self.dev) };
    }
}

/// `THIS_MODULE`, for tables that are constants.
#[cfg(MODULE)]
const THIS_MODULE: *mut bindings::module = &raw mut bindings::__this_module;
#[cfg(not(MODULE))]
const THIS_MODULE: *mut bindings::module = ptr::null_mut();

/// # Invariants
///
/// A registered cdev of ours.
struct Cdev(NonNull<bindings::cdev>);

impl Cdev {
    fn new<T: CharDevice>(module: &'static ThisModule, dev: bindings::dev_t) -> Result<Self> {
        // SAFETY: No requirement.
        let cdev = NonNull::new(unsafe { bindings::cdev_alloc() }).ok_or(ENOMEM)?;
        // INVARIANT: Not registered yet; `cdev_del()` takes that as well, and drops the reference.
        let this = Self(cdev);

        // SAFETY: The cdev is new and ours. Its operations are a constant of this module.
        unsafe {
            (*cdev.as_ptr()).ops = &Registration::<T>::FOPS;
            (*cdev.as_ptr()).owner = module.as_ptr();
            to_result(bindings::cdev_add(cdev.as_ptr(), dev, 1))?;
        }
        Ok(this)
    }
}

impl Drop for Cdev {
    fn drop(&mut self) {
        // SAFETY: Ours, and given up here.
        unsafe { bindings::cdev_del(self.0.as_ptr()) };
    }
}

/// # Invariants
///
/// A registered class of ours.
struct Class(NonNull<bindings::class>);

impl Class {
    fn new<T: CharDevice>() -> Result<Self> {
        // SAFETY: The name lives for ever.
        let class = from_err_ptr(unsafe { bindings::class_create(T::CLASS.as_char_ptr()) })?;
        let class = NonNull::new(class).ok_or(ENOMEM)?;

        // SAFETY: The class is ours and has no device yet, so nobody reads this.
        unsafe { (*class.as_ptr()).devnode = Some(Registration::<T>::devnode) };
        // INVARIANT: `class_create()` registered it.
        Ok(Self(class))
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        // SAFETY: Ours, and given up here; its device is gone.
        unsafe { bindings::class_destroy(self.0.as_ptr()) };
    }
}
