// SPDX-License-Identifier: GPL-2.0

//! The cost of an object and of a mapping of it: time, memory, VMAs.

use std::fs;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use rustix::fs::CWD;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::openat;

use crate::Bench;
use crate::Cost;
use crate::Scale;
use crate::memory::FILES;
use crate::memory::Map;
use crate::memory::Memory;
use crate::memory::Subject;
use crate::memory::Subject::*;
use crate::memory::new_file;
use crate::timed;

/// A new object. For the ioctl it comes from `device`, so opening the device is not measured.
fn open(subject: Subject, device: &OwnedFd) -> Result<Memory> {
    let fd = match subject {
        Ioctl => Some(new_file(device)?),
        _ => subject.open()?,
    };
    Ok(Memory { subject, fd })
}

fn device() -> Result<OwnedFd> {
    Ok(openat(CWD, "/dev/anon", OFlags::RDWR, Mode::empty())?)
}

fn open_close(subject: Subject, times: usize, mapped: bool) -> Result<Cost> {
    let device = device()?;
    let (time, ()) = timed(|| {
        for _ in 0..times {
            let memory = open(subject, &device)?;
            if mapped {
                memory.map_anywhere(0, 1)?.unmap()?;
            }
        }
        Ok(())
    })?;
    Ok(Cost::time(time, times))
}

/// Memory of the kernel's slab objects, in bytes.
fn slab_bytes() -> Result<usize> {
    // First lets freed objects go: those that wait for RCU, and free slabs in the caches.
    thread::sleep(Duration::from_millis(100));
    for cache in fs::read_dir("/sys/kernel/slab").context("/sys/kernel/slab")? {
        fs::write(cache?.path().join("shrink"), "1").context("shrink")?;
    }
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Slab:"));
    let words = line.context("no Slab")?.trim().split(' ').next();
    Ok(words.context("no number")?.parse::<usize>()? << 10)
}

/// Each object has a mapping, as the device creates its memory at the first one.
fn object_bytes(subject: Subject, objects: usize) -> Result<Cost> {
    let device = device()?;
    let mut held = Vec::with_capacity(objects);
    let before = slab_bytes()?;
    for _ in 0..objects {
        let memory = open(subject, &device)?;
        let map = memory.map_anywhere(0, 1)?;
        held.push((memory, map));
    }
    let bytes = slab_bytes()?.saturating_sub(before);
    for (_, map) in &held {
        map.unmap()?;
    }
    Ok(Cost::Bytes(bytes as f64 / held.len() as f64))
}

fn mapping_bytes(subject: Subject, maps: usize) -> Result<Cost> {
    let memory = Memory::new(subject, 2 * maps)?;
    let room = Map::reserve(2 * maps)?;
    let before = slab_bytes()?;
    for number in 0..maps {
        memory.map_over(room.part(2 * number, 1), 2 * number)?;
    }
    let bytes = slab_bytes()?.saturating_sub(before);
    let vmas = room.vmas()?;
    room.unmap()?;
    // Each mapping splits the reservation, which makes two more VMAs.
    Ok(Cost::Bytes(bytes as f64 / (vmas / 2) as f64))
}

/// Number of VMAs that mappings adjacent in memory and in the file make.
fn vmas(subject: Subject, maps: usize) -> Result<Cost> {
    let memory = Memory::new(subject, maps)?;
    let room = Map::reserve(maps)?;
    for number in 0..maps {
        memory.map_over(room.part(number, 1), number)?;
    }
    let vmas = room.vmas()?;
    room.unmap()?;
    Ok(Cost::Vmas(vmas as f64))
}

pub fn benches(scale: Scale) -> Vec<Bench> {
    let files = scale.of(5000);
    let maps = scale.of(10_000);
    vec![
        Bench::new(
            "open and close",
            "a new object, and its end",
            &[Device, Ioctl, Memfd, Tmpfs, Zero],
            move |s| open_close(s, files, false),
        ),
        Bench::new(
            "open, map and close",
            "a new object, a mapping of it, and the end of both",
            FILES,
            move |s| open_close(s, files, true),
        ),
        Bench::new(
            "memory of an object",
            "an open object and a mapping of it",
            FILES,
            move |s| object_bytes(s, files),
        )
        .rounds(1),
        Bench::new(
            "memory of a mapping",
            "a VMA, and one beside it",
            FILES,
            move |s| mapping_bytes(s, 2 * maps),
        )
        .rounds(1),
        Bench::new(
            "VMAs of adjacent maps of a page",
            "10,000 maps",
            FILES,
            move |s| vmas(s, maps),
        )
        .rounds(1),
    ]
}
