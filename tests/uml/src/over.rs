// SPDX-License-Identifier: GPL-2.0

//! A program maps a file over half of its pages of /dev/anon, and the host has that half back.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::ptr;
use std::slice;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use rustix::mm::mmap;
use rustix::mm::munmap;

use crate::guest::RUN;
use crate::host::DEVICE;
use crate::host::Memory;
use crate::host::SHMEM_TOLERANCE;

pub const MIB: usize = 256;
const BYTES: usize = MIB << 20;
const HALF: usize = BYTES / 2;
const PAGE: usize = 4096;
const FILL: u8 = 0xa5;

/// Goes through the steps, checks each, and shows it.
pub fn run(mut show: impl FnMut(&str, Memory)) -> Result<()> {
    let used = (BYTES >> 10) as i64;
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    let file = File::open(RUN)?;
    // Whole pages of the file, again and again over the first half.
    let mut contents = fs::read(RUN)?;
    contents.truncate(contents.len() & !(PAGE - 1));
    let rights = ProtFlags::READ | ProtFlags::WRITE;

    let before = Memory::now()?;
    show("before", before);
    let mut step = |what, used| {
        show(what, after(before, used).context(what)?);
        anyhow::Ok(())
    };
    // SAFETY: a new mapping, at an address of the kernel's choice, in nobody else's use; all of it
    // may be written to. What is mapped over it lies within it, before anything refers to it.
    let (start, memory) = unsafe {
        let start = mmap(ptr::null_mut(), BYTES, rights, MapFlags::SHARED, &device, 0)?;
        start.cast::<u8>().write_bytes(FILL, BYTES);
        step("all of them written to", used)?;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        for offset in (0..HALF).step_by(contents.len()) {
            let len = contents.len().min(HALF - offset);
            mmap(
                start.byte_add(offset),
                len,
                ProtFlags::READ,
                flags,
                &file,
                0,
            )?;
        }
        (start, slice::from_raw_parts(start.cast::<u8>(), BYTES))
    };
    let (over, rest) = memory.split_at(HALF);
    ensure!(
        over.chunks(contents.len())
            .all(|c| c == &contents[..c.len()]),
        "the half that was mapped over is not the file"
    );
    ensure!(
        rest.chunks(PAGE).all(|page| page == [FILL; PAGE]),
        "the other half has changed"
    );
    step("a file mapped over half of them", used / 2)?;
    // SAFETY: nothing refers to the memory any more.
    unsafe { munmap(start, BYTES)? };
    step("all unmapped", 0)
}

/// Both figures show that so many KiB of /dev/anon are in use, of Shmem and of free memory.
fn after(before: Memory, used: i64) -> Result<Memory> {
    let now = Memory::with_free(before.free - used)?;
    let shmem = now.shmem - before.shmem;
    ensure!(
        (shmem - used).abs() <= SHMEM_TOLERANCE,
        "Shmem has grown by {shmem} KiB, wanted {used}"
    );
    Ok(now)
}
