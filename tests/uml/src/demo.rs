// SPDX-License-Identifier: GPL-2.0

//! Shows the host's memory before guests run, while they run, and afterwards; then the effect of
//! mapping over pages. Each row is checked: the demonstration fails if the memory is not as claimed.

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

fn print_row(what: &str, memory: Memory) {
    println!(
        "{what:<52}{:>12.1}{:>12.1}",
        mib(memory.shmem),
        mib(memory.free)
    );
}

/// Waits until Shmem is about `shmem` KiB, and prints a row.
fn print_row_at(what: &'static str, shmem: i64) -> Result<Memory> {
    let memory = Memory::wait_shmem(shmem).context(what)?;
    print_row(what, memory);
    Ok(memory)
}

fn mib(kib: i64) -> f64 {
    kib as f64 / 1024.0
}

fn print_header(title: &str) {
    println!("\n{title:<52}{:>12}{:>12}", "Shmem", "free");
}

pub fn run() -> Result<()> {
    host::load_module()?;
    if !Path::new(DEVICE).exists() {
        host::make_node()?;
    }
    let (_, tmp) = host::filesystem_usage("/tmp")?;
    let (_, shm) = host::filesystem_usage("/dev/shm")?;
    println!(
        "The host's memory in MiB. /tmp holds {:.0}, /dev/shm holds {:.0}.\n\
         Free is MemFree and the free pages each CPU keeps; page tables take a little of it.",
        mib(tmp),
        mib(shm)
    );
    guests()?;
    print_header(&format!("A program with {} MiB of /dev/anon", over::MIB));
    over::run(print_row)?;
    host::unload_module()?;
    println!("\nThe module is unloaded.");
    Ok(())
}

fn guests() -> Result<()> {
    print_header(&format!(
        "{GUESTS} UML guests of {SIZE} MiB, as an unprivileged user"
    ));
    let before = Memory::now()?;
    print_row("before", before);
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
    let full = total_cost(&guests)?;
    print_row_at(
        "all up, 24 MB unpacked and checked in each",
        before.shmem + full,
    )?;
    print_held(full);

    for guest in &mut guests {
        guest.say("forget")?;
        guest.expect("guest: forgot")?;
    }
    for guest in &guests {
        wait_reported(guest)?;
    }
    // Reporting the last free pages takes a few more rounds.
    thread::sleep(Duration::from_secs(8));
    let empty = total_cost(&guests)?;
    ensure!(
        empty < full - (GUESTS as i64 * (12 << 10)),
        "{full} KiB with the files, {empty} KiB after they were removed"
    );
    let all = print_row_at(
        "the files removed, free memory reported",
        before.shmem + empty,
    )?;
    print_held(empty);

    let mut killed = guests.pop().context("no guest")?;
    let memory = killed.memory()?.cost;
    killed.kill(Signal::KILL)?;
    killed.wait(&[128 + 9])?;
    print_row_at("one killed with SIGKILL", all.shmem - memory)?;

    for guest in &mut guests {
        guest.power_off()?;
    }
    print_row_at("the others shut down", before.shmem)?;
    unmodified(before)
}

/// Debian's own UML, which knows nothing of /dev/anon.
fn unmodified(before: Memory) -> Result<()> {
    let mut guest = Setup::unmodified(1).start()?;
    guest.wait_up()?;
    guest.say("unpack")?;
    guest.wait_workload()?;
    print_row_at(
        "Debian's unmodified UML at the same work",
        before.shmem + guest.memory()?.cost,
    )?;
    guest.power_off()?;
    print_row_at("shut down", before.shmem)?;
    Ok(())
}

fn total_cost(guests: &[Guest]) -> Result<i64> {
    let mut total = 0;
    for guest in guests {
        total += guest.memory()?.cost;
    }
    Ok(total)
}

fn print_held(total: i64) {
    println!(
        "{:<52}{:>12.1}",
        "  of that on /dev/anon, by fdinfo",
        mib(total)
    );
}
