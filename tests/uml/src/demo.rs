// SPDX-License-Identifier: GPL-2.0

//! The host's memory, before, with guests, and after; and what mapping over does.

use std::ffi::c_void;
use std::fs::File;
use std::fs::OpenOptions;
use std::path::Path;
use std::ptr;

use anyhow::Context;
use anyhow::Result;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use rustix::mm::mmap;
use rustix::mm::munmap;
use rustix::process::Signal;

use crate::guest::Guest;
use crate::guest::SIZE;
use crate::guest::UML;
use crate::host;
use crate::host::DEVICE;
use crate::host::Memory;

const GUESTS: usize = 4;
const BYTES: usize = 256 << 20;
/// What the kernel may keep for itself when pages come back: page tables, lists per CPU. In KiB.
const SLACK: i64 = 4 << 10;

fn row(what: &str, memory: Memory) {
    println!(
        "{what:<52}{:>12.1}{:>14.1}",
        mib(memory.shmem),
        mib(memory.available)
    );
}

fn mib(kib: i64) -> f64 {
    kib as f64 / 1024.0
}

fn head(title: &str) {
    println!("\n{title:<52}{:>12}{:>14}", "Shmem", "MemAvailable");
}

pub fn run() -> Result<()> {
    host::load_module()?;
    if !Path::new(DEVICE).exists() {
        host::make_node()?;
    }
    let (_, tmp) = host::filesystem("/tmp")?;
    let (_, shm) = host::filesystem("/dev/shm")?;
    println!(
        "The host's memory in MiB. /tmp holds {:.0}, /dev/shm holds {:.0}.",
        mib(tmp),
        mib(shm)
    );
    guests()?;
    map_over()?;
    host::unload_module()?;
    println!("\nThe module is unloaded.");
    Ok(())
}

fn guests() -> Result<()> {
    head(&format!(
        "{GUESTS} UML guests of {SIZE} MiB, as an unprivileged user"
    ));
    let before = Memory::now()?;
    row("before", before);
    let mut guests = Vec::new();
    for number in 1..=GUESTS {
        guests.push(Guest::start(&format!("g{number}"), &[])?);
    }
    for guest in &mut guests {
        guest.wait_up()?;
    }
    for guest in &mut guests {
        guest.wait_workload()?;
    }
    row("all up, 24 MB unpacked and checked in each", Memory::now()?);
    let mut total = 0;
    for guest in &guests {
        total += guest.memory()?.resident;
    }
    println!(
        "{:<52}{:>12.1}",
        "  of that on /dev/anon, by fdinfo",
        mib(total)
    );

    let mut killed = guests.pop().context("no guest")?;
    let held = killed.memory()?.resident;
    let all = Memory::now()?;
    killed.kill(Signal::KILL)?;
    killed.wait()?;
    row(
        "one killed with SIGKILL",
        Memory::after_fall_to(all.shmem - held)?,
    );

    for guest in &mut guests {
        guest.say("poweroff")?;
    }
    for guest in &mut guests {
        guest.wait()?;
    }
    row("the others shut down", Memory::after_fall_to(before.shmem)?);
    Ok(())
}

/// A program with pages of /dev/anon maps a file over half of them.
fn map_over() -> Result<()> {
    head(&format!("A program with {} MiB of /dev/anon", BYTES >> 20));
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    let file = File::open(UML)?;
    // Whole pages of the file, again and again over the first half.
    let step = file.metadata()?.len() as usize & !4095;
    let rights = ProtFlags::READ | ProtFlags::WRITE;

    let before = Memory::now()?;
    row("before", before);
    // SAFETY: a new mapping, at an address of the kernel's choice, in nobody else's use. What is
    // mapped over it lies within it.
    unsafe {
        let start = mmap(ptr::null_mut(), BYTES, rights, MapFlags::SHARED, &device, 0)?;
        start.cast::<u8>().write_bytes(0xa5, BYTES);
        row("all of them written to", Memory::now()?);
        for offset in (0..BYTES / 2).step_by(step) {
            let len = step.min(BYTES / 2 - offset);
            let at: *mut c_void = start.byte_add(offset);
            mmap(
                at,
                len,
                ProtFlags::READ,
                MapFlags::PRIVATE | MapFlags::FIXED,
                &file,
                0,
            )?;
        }
        let half = before.available - (BYTES >> 11) as i64;
        row(
            "a file mapped over half of them",
            Memory::after_rise_to(half - SLACK)?,
        );
        munmap(start, BYTES)?;
    }
    row(
        "all unmapped",
        Memory::after_rise_to(before.available - SLACK)?,
    );
    Ok(())
}
