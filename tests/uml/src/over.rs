// SPDX-License-Identifier: GPL-2.0

//! A program maps a file over half of its /dev/anon pages; the host gets that half back.

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

use crate::guest::DEVANON_RUN;
use crate::host::DEVICE;
use crate::host::Memory;
use crate::host::SHMEM_TOLERANCE;

pub const MIB: usize = 256;
const BYTES: usize = MIB << 20;
const HALF: usize = BYTES / 2;
const PAGE: usize = 4096;
const FILL: u8 = 0xa5;

/// Runs the steps, and checks and shows the memory after each.
pub fn run(mut show: impl FnMut(&str, Memory)) -> Result<()> {
    let used = (BYTES >> 10) as i64;
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    let file = File::open(DEVANON_RUN)?;
    // Whole pages of the file, repeated over the first half.
    let mut contents = fs::read(DEVANON_RUN)?;
    contents.truncate(contents.len() & !(PAGE - 1));
    let prot = ProtFlags::READ | ProtFlags::WRITE;

    let before = Memory::now()?;
    show("before", before);
    let mut step = |what, used| {
        show(what, memory_after(before, used).context(what)?);
        anyhow::Ok(())
    };
    // SAFETY: a new, writable mapping, at an address chosen by the kernel. The file is mapped within
    // it, before any reference into it exists.
    let (start, memory) = unsafe {
        let start = mmap(ptr::null_mut(), BYTES, prot, MapFlags::SHARED, &device, 0)?;
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
    let (replaced, rest) = memory.split_at(HALF);
    ensure!(
        replaced
            .chunks(contents.len())
            .all(|c| c == &contents[..c.len()]),
        "the half that was mapped over does not read as the file"
    );
    ensure!(
        rest.chunks(PAGE).all(|page| page == [FILL; PAGE]),
        "the other half has changed"
    );
    step("a file mapped over half of them", used / 2)?;
    // SAFETY: no reference into the memory is used from here on.
    unsafe { munmap(start, BYTES)? };
    step("all unmapped", 0)
}

/// Checks that Shmem has grown and free memory has shrunk by `used` KiB.
fn memory_after(before: Memory, used: i64) -> Result<Memory> {
    let now = Memory::wait_free(before.free - used)?;
    let shmem = now.shmem - before.shmem;
    ensure!(
        (shmem - used).abs() <= SHMEM_TOLERANCE,
        "Shmem has grown by {shmem} KiB, expected {used}"
    );
    Ok(now)
}
