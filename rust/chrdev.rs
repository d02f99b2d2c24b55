// SPDX-License-Identifier: GPL-2.0

//! A character device with a number of its own: cdev, class and node.
//!
//! The unsafe side (`rust/` out of tree): the kernel crate does not wrap cdevs, classes or a
//! `file_operations` with `mmap` for them.
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

/// A character device driver. Every method is called in process context and may sleep.
pub(crate) trait CharDevice {
    /// What backs an open file of the device, from its first mapping on.
    type Backing: AlwaysRefCounted;

    /// The name of the class, in `/sys/class`.
    const CLASS: &'static CStr;

    /// The name of the device, in `/sys/class/CLASS` and `/dev`.
    const NAME: &'static CStr;

    /// The permissions of the node that devtmpfs makes.
    fn mode() -> u16;

    /// Makes the backing of an open file that is mapped for the first time. Called under
    /// `mmap_lock` held for writing. If several tasks map the file at once, one backing is kept.
    /// What a mapping with `MAP_FIXED` replaces is gone by then, even if this fails.
    fn new_backing() -> Result<ARef<Self::Backing>>;

    /// `mmap(2)`, called under `mmap_lock` held for writing.
    fn mmap(backing: &Self::Backing, vma: &NewVma) -> Result;

    /// `ioctl(2)`.
    fn ioctl(cmd: u32, arg: usize) -> Result<c_long>;

    /// A read of `/proc/PID/fdinfo/N`. There is no backing before the first mapping.
    fn show_fdinfo(backing: Option<&Self::Backing>, m: &SeqFile);
}

/// A registered device, with a node in `/dev` if devtmpfs is in use.
///
/// # Invariants
///
/// `_cdev` is registered for `dev`, and `class`, which is ours, has a device for `dev`.
pub(crate) struct Registration<T: CharDevice> {
    _cdev: Cdev,
    class: Class,
    dev: bindings::dev_t,
    _driver: PhantomData<T>,
}

// SAFETY: A device may be unregistered by another thread than the one that registered it.
unsafe impl<T: CharDevice> Send for Registration<T> {}
// SAFETY: No method takes `&self`.
unsafe impl<T: CharDevice> Sync for Registration<T> {}

impl<T: CharDevice> Registration<T> {
    /// Registers the device `major`:`minor`. It can be opened before this returns.
    ///
    /// Does not reserve the number with `register_chrdev_region()`. A narrower range of numbers
    /// takes precedence over a wider one, so one minor of another driver's major can be had.
    ///
    /// May sleep.
    pub(crate) fn new(module: &'static ThisModule, major: u32, minor: u32) -> Result<Self> {
        // `MKDEV()`.
        let dev = (major << 20) | minor;
        let class = Class::new::<T>()?;
        let cdev = Cdev::new::<T>(module, dev)?;

        // SAFETY: The class is registered, and the name matches the `%s` of the format.
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
        // INVARIANT: All three steps succeeded.
        Ok(Self {
            _cdev: cdev,
            class,
            dev,
            _driver: PhantomData,
        })
    }

    /// The backing of an open file, if it has one. Takes `f_lock`.
    ///
    /// # Safety
    ///
    /// `file` must be an open file of this device, and stay open for `'a`.
    unsafe fn backing<'a>(file: *mut bindings::file) -> Option<&'a T::Backing> {
        // SAFETY: The file is live. `private_data` is null in a new file, and set once, under
        // `f_lock`, to a reference that only `release` drops, which comes after `'a`.
        unsafe {
            bindings::spin_lock(&raw mut (*file).f_lock);
            let backing: *const T::Backing = (*file).private_data.cast();
            bindings::spin_unlock(&raw mut (*file).f_lock);
            backing.as_ref()
        }
    }

    /// Gives an open file the backing `new`, unless it got one meanwhile. Returns the one it has.
    /// Takes `f_lock`.
    ///
    /// # Safety
    ///
    /// `file` must be an open file of this device, and stay open for `'a`.
    unsafe fn backing_or_set<'a>(
        file: *mut bindings::file,
        new: ARef<T::Backing>,
    ) -> &'a T::Backing {
        // SAFETY: The file is live. `private_data`, changed under `f_lock` only, ends up as a
        // pointer that is not null, with a reference that only `release` drops, after `'a`.
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
    /// `file` must be an open file of this device, and stay open during the call.
    unsafe fn map(file: *mut bindings::file, vma: &NewVma) -> Result {
        // SAFETY: The caller keeps the file open during the call.
        if let Some(backing) = unsafe { Self::backing(file) } {
            return T::mmap(backing, vma);
        }
        let new = T::new_backing()?;
        // SAFETY: The caller keeps the file open during the call.
        T::mmap(unsafe { Self::backing_or_set(file, new) }, vma)
    }

    /// # Safety
    ///
    /// `file` must be a file of this device that is not used after this. Must be called once for
    /// it, as the VFS does.
    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: `private_data` is null or a reference, and the file is not used after this.
        unsafe {
            if let Some(backing) = NonNull::new((*file).private_data) {
                drop(ARef::<T::Backing>::from_raw(backing.cast()));
            }
        }
        0
    }

    /// # Safety
    ///
    /// `file` must be an open file of this device. `vma` must be a VMA that is being mapped, with
    /// `mmap_lock` held for writing. Both must stay valid during the call.
    #[cfg(not(devanon_mmap_prepare))]
    unsafe extern "C" fn mmap(
        file: *mut bindings::file,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: The caller vouches for both the file and the VMA.
        match unsafe { Self::map(file, NewVma::from_raw(vma)) } {
            Ok(()) => 0,
            Err(err) => err.to_errno(),
        }
    }

    /// # Safety
    ///
    /// `desc` must be the description, valid and ours during the call, of a mapping of an open file
    /// of this device.
    #[cfg(devanon_mmap_prepare)]
    unsafe extern "C" fn mmap_prepare(desc: *mut bindings::vm_area_desc) -> c_int {
        // SAFETY: The caller vouches for the description, whose `file` is the one being mapped.
        match unsafe { Self::map((*desc).file, NewVma::from_raw(desc)) } {
            Ok(()) => 0,
            Err(err) => err.to_errno(),
        }
    }

    /// # Safety
    ///
    /// No requirements: `file_operations` wants an unsafe function.
    unsafe extern "C" fn ioctl(_file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
        match T::ioctl(cmd, arg) {
            Ok(ret) => ret,
            Err(err) => err.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// `file` must be an open file of this device, and `m` a seq_file that nobody else uses. Both
    /// must stay valid during the call.
    unsafe extern "C" fn show_fdinfo(m: *mut bindings::seq_file, file: *mut bindings::file) {
        // SAFETY: The caller vouches for both the file and `m`.
        unsafe { T::show_fdinfo(Self::backing(file), SeqFile::from_raw(m)) };
    }

    /// # Safety
    ///
    /// `mode` must be null or valid for writes.
    unsafe extern "C" fn devnode(
        _dev: *const bindings::device,
        mode: *mut bindings::umode_t,
    ) -> *mut c_char {
        if !mode.is_null() {
            // SAFETY: `mode` is not null, so it is valid for writes.
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
        // SAFETY: By the type invariant the class exists and has a device of this number. The
        // fields are dropped afterwards, the cdev before the class.
        unsafe { bindings::device_destroy(self.class.0.as_ptr(), self.dev) };
    }
}

/// `THIS_MODULE`, for use in constants.
#[cfg(MODULE)]
const THIS_MODULE: *mut bindings::module = &raw mut bindings::__this_module;
#[cfg(not(MODULE))]
const THIS_MODULE: *mut bindings::module = ptr::null_mut();

/// A cdev.
///
/// # Invariants
///
/// The cdev is ours, from `cdev_alloc()`; once [`Self::new`] has succeeded it is registered.
struct Cdev(NonNull<bindings::cdev>);

impl Cdev {
    fn new<T: CharDevice>(module: &'static ThisModule, dev: bindings::dev_t) -> Result<Self> {
        // SAFETY: No requirement.
        let cdev = NonNull::new(unsafe { bindings::cdev_alloc() }).ok_or(ENOMEM)?;
        // INVARIANT: Just allocated. If registration fails, `drop` gives the reference back.
        let this = Self(cdev);

        // SAFETY: The cdev is new and ours. Its operations are a constant that lives as long as the
        // module.
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
        // SAFETY: The cdev is ours, and not used after this.
        unsafe { bindings::cdev_del(self.0.as_ptr()) };
    }
}

/// A device class.
///
/// # Invariants
///
/// The class is ours, and registered.
struct Class(NonNull<bindings::class>);

impl Class {
    fn new<T: CharDevice>() -> Result<Self> {
        // SAFETY: The name has a static lifetime.
        let class = from_err_ptr(unsafe { bindings::class_create(T::CLASS.as_char_ptr()) })?;
        let class = NonNull::new(class).ok_or(ENOMEM)?;

        // SAFETY: The class is ours and has no device yet, so nobody reads the field.
        unsafe { (*class.as_ptr()).devnode = Some(Registration::<T>::devnode) };
        // INVARIANT: `class_create()` registered it.
        Ok(Self(class))
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        // SAFETY: The class is ours, not used after this, and its device is gone.
        unsafe { bindings::class_destroy(self.0.as_ptr()) };
    }
}
