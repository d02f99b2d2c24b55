// SPDX-License-Identifier: GPL-2.0

//! The host's memory, before, with guests, and after; and what mapping over does. Each row is
//! checked: the demonstration fails where the memory is not as it claims.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::process::Signal;

use crate::guest::Guest;
use crate::guest::SIZE;
use crate::guest::Setup;
use crate::host;
use crate::host::DEVICE;
use crate::host::Memory;
use crate::kernel::wait_reported;
use crate::over;

const GUESTS: usize = 4;

fn row(what: &str, memory: Memory) {
    println!(
        "{what:<52}{:>12.1}{:>12.1}",
        mib(memory.shmem),
        mib(memory.free)
    );
}

/// A row with so much Shmem.
fn step(what: &'static str, shmem: i64) -> Result<Memory> {
    let memory = Memory::with_shmem(shmem).context(what)?;
    row(what, memory);
    Ok(memory)
}

fn mib(kib: i64) -> f64 {
    kib as f64 / 1024.0
}

fn head(title: &str) {
    println!("\n{title:<52}{:>12}{:>12}", "Shmem", "free");
}

pub fn run() -> Result<()> {
    host::load_module()?;
    if !Path::new(DEVICE).exists() {
        host::make_node()?;
    }
    let (_, tmp) = host::filesystem("/tmp")?;
    let (_, shm) = host::filesystem("/dev/shm")?;
    println!(
        "The host's memory in MiB. /tmp holds {:.0}, /dev/shm holds {:.0}.\n\
         Free is MemFree and the free pages each CPU keeps; page tables take a little of it.",
        mib(tmp),
        mib(shm)
    );
    guests()?;
    head(&format!("A program with {} MiB of /dev/anon", over::MIB));
    over::run(row)?;
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
        guests.push(Setup::ours(number).start()?);
    }
    for guest in &mut guests {
        guest.wait_up()?;
        guest.say("unpack")?;
    }
    for guest in &mut guests {
        guest.wait_workload()?;
    }
    let full = held(&guests)?;
    step(
        "all up, 24 MB unpacked and checked in each",
        before.shmem + full,
    )?;
    of_that(full);

    for guest in &mut guests {
        guest.say("forget")?;
        guest.expect("guest: forgot")?;
    }
    for guest in &guests {
        wait_reported(guest)?;
    }
    // The last of it takes some more turns.
    thread::sleep(Duration::from_secs(8));
    let empty = held(&guests)?;
    ensure!(
        empty < full - (GUESTS as i64 * (12 << 10)),
        "{full} KiB, and {empty} after the files were removed"
    );
    let all = step(
        "the files removed, free memory reported",
        before.shmem + empty,
    )?;
    of_that(empty);

    let mut killed = guests.pop().context("no guest")?;
    let memory = killed.memory()?.cost;
    killed.kill(Signal::KILL)?;
    killed.wait(&[128 + 9])?;
    step("one killed with SIGKILL", all.shmem - memory)?;

    for guest in &mut guests {
        guest.power_off()?;
    }
    step("the others shut down", before.shmem)?;
    unmodified(before)
}

/// Debian's own UML, which has no idea of /dev/anon.
fn unmodified(before: Memory) -> Result<()> {
    let mut guest = Setup::unmodified(1).start()?;
    guest.wait_up()?;
    guest.say("unpack")?;
    guest.wait_workload()?;
    step(
        "Debian's unmodified UML at the same work",
        before.shmem + guest.memory()?.cost,
    )?;
    guest.power_off()?;
    step("shut down", before.shmem)?;
    Ok(())
}

fn held(guests: &[Guest]) -> Result<i64> {
    let mut total = 0;
    for guest in guests {
        total += guest.memory()?.cost;
    }
    Ok(total)
}

fn of_that(total: i64) {
    println!(
        "{:<52}{:>12.1}",
        "  of that on /dev/anon, by fdinfo",
        mib(total)
    );
}
