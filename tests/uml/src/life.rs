// SPDX-License-Identifier: GPL-2.0

//! Follows a Debian guest from boot to shutdown and measures its cost: JSON lines for devanon-plot.

use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use serde_json::json;

use crate::guest::Guest;
use crate::guest::Setup;
use crate::host;
use crate::host::Backing;
use crate::kernel::on;
use crate::kernel::prepare;
use crate::mconsole::Console;

/// The guest's memory size, in MiB.
const SIZE: u32 = 256;
/// Long enough for all free pages to be reported.
const IDLE: Duration = Duration::from_secs(45);

/// UML as it is today does not report free pages: they stay in its memory file.
pub const TODAY: &[&str] = &["page_reporting=off"];

pub fn figure(name: &str, value: f64, unit: &str, goal: Option<f64>) {
    println!(
        "{}",
        json!({"figure": {"name": name, "value": value, "unit": unit, "goal": goal}})
    );
}

pub fn mib(kib: i64) -> f64 {
    kib as f64 / 1024.0
}

/// Takes a sample each second until told to stop.
fn sample(
    run: &'static str,
    pid: i32,
    console: Option<Console>,
    stop: &AtomicBool,
    start: Instant,
) {
    while !stop.load(Relaxed) {
        let line = || -> Result<String> {
            let memory = host::memory_file(pid)?.context("no memory file")?;
            let used = match &console {
                None => None,
                Some(console) => {
                    let meminfo = console.proc("meminfo")?;
                    Some(host::field(&meminfo, "MemTotal")? - host::field(&meminfo, "MemFree")?)
                }
            };
            Ok(json!({"sample": {
                "run": run,
                "seconds": start.elapsed().as_secs_f64(),
                "host_kib": memory.cost,
                "guest_used_kib": used,
            }})
            .to_string())
        };
        // There is no memory file before the guest creates it, and none after it has exited.
        if let Ok(line) = line() {
            println!("{line}");
        }
        thread::sleep(Duration::from_secs(1));
    }
}

/// Host memory at the login prompt, after the work, and at the end, and how much of the last exceeds
/// the guest's use, in KiB.
struct Costs {
    prompt: i64,
    most: i64,
    end: i64,
    excess: i64,
}

fn follow(run: &'static str, title: &str, mut guest: Guest) -> Result<Costs> {
    println!("{}", json!({"run": {"run": run, "title": title}}));
    let start = Instant::now();
    let phase = |name: &str| {
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{}",
            json!({"phase": {"run": run, "seconds": seconds, "name": name}})
        );
        eprintln!("devanon-uml: {run}: {name}");
    };
    let stop = Arc::new(AtomicBool::new(false));
    let pid = guest.pid();
    let sampler = |console| {
        let stop = stop.clone();
        thread::spawn(move || sample(run, pid, console, &stop, start))
    };
    phase("boot");
    let first = sampler(None);
    guest.wait_up()?;
    stop.store(true, Relaxed);
    let _ = first.join();
    stop.store(false, Relaxed);
    let second = sampler(Some(guest.mconsole()?));
    let prompt = guest.memory()?.cost;
    guest.log_in()?;
    phase("unpack, check");
    guest.work("unpack")?;
    phase("compile, Python");
    guest.work("compile")?;
    guest.work("python")?;
    phase("read programs");
    guest.say("cat /usr/bin/* /usr/lib/x86_64-linux-gnu/* >/dev/null 2>&1; echo read")?;
    guest.expect("read")?;
    let most = guest.memory()?.cost;
    phase("drop caches, idle");
    guest.work("forget")?;
    thread::sleep(IDLE);
    let end = guest.memory()?.cost;
    stop.store(true, Relaxed);
    let _ = second.join();
    let excess = guest.excess()?;
    guest.power_off()?;
    Ok(Costs {
        prompt,
        most,
        end,
        excess,
    })
}

pub fn run() -> Result<()> {
    ensure!(prepare(), "cannot prepare the VM");
    let ours = follow(
        "anon",
        "/dev/anon, free pages reported",
        on(1, Backing::Anon).debian().size(SIZE).start()?,
    )?;
    let today = follow(
        "tmpfs",
        "a file on tmpfs, as today",
        on(1, Backing::File)
            .with(TODAY)
            .debian()
            .size(SIZE)
            .start()?,
    )?;
    figure(
        "host memory beyond what the guest uses, after it dropped its caches",
        mib(ours.excess),
        "MiB",
        Some(10.0),
    );
    figure(
        "  the same on tmpfs, as today",
        mib(today.excess),
        "MiB",
        None,
    );
    for (name, ours, today) in [
        ("at the login prompt", ours.prompt, today.prompt),
        ("at work", ours.most, today.most),
        ("after it dropped its caches", ours.end, today.end),
    ] {
        figure(
            &format!("host memory {name}, /dev/anon"),
            mib(ours),
            "MiB",
            None,
        );
        figure(
            &format!("host memory {name}, tmpfs as today"),
            mib(today),
            "MiB",
            None,
        );
    }
    Ok(())
}

/// CPU time of all descendants that have been waited for. With -icount a nanosecond is an
/// instruction.
fn instructions() -> Result<f64> {
    // SAFETY: all zeros is a valid rusage, and the kernel writes to it.
    let usage = unsafe {
        let mut usage: libc::rusage = mem::zeroed();
        if libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) != 0 {
            return Err(io::Error::last_os_error().into());
        }
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Ok((seconds(usage.ru_utime) + seconds(usage.ru_stime)) * 1e9)
}

/// A guest that does not report free pages.
fn without_reporting(backing: Backing) -> Setup {
    on(1, backing).with(TODAY)
}

/// Counts the instructions of a guest from boot to power off, with some work or none.
pub fn instructions_of(setup: Setup, work: &[&str]) -> Result<f64> {
    let command = setup.command_line();
    let before = instructions()?;
    let mut guest = setup.debian().size(SIZE).start()?;
    guest.wait_up()?;
    guest.log_in()?;
    for words in work {
        guest.work(words)?;
    }
    guest.power_off()?;
    let cost = instructions()? - before;
    eprintln!(
        "devanon-uml: {command}, work {work:?}: {:.2} billion instructions",
        cost / 1e9
    );
    Ok(cost)
}

pub fn count() -> Result<()> {
    ensure!(prepare(), "cannot prepare the VM");
    // The first guest also pays for one-time work of the host.
    instructions_of(without_reporting(Backing::File), &[])?;
    let tmpfs = instructions_of(without_reporting(Backing::File), &[])?;
    let anon = instructions_of(without_reporting(Backing::Anon), &[])?;
    figure(
        "instructions of a boot to the login prompt, /dev/anon against tmpfs",
        anon / tmpfs,
        "",
        Some(1.02),
    );
    let work = ["unpack", "compile", "check", "forget", "unpack", "compile"];
    let unreported = instructions_of(without_reporting(Backing::Anon), &work)?;
    let reported = instructions_of(on(1, Backing::Anon), &work)?;
    figure(
        "instructions of a workload, free pages reported against not",
        reported / unreported,
        "",
        Some(1.03),
    );
    Ok(())
}

/// Counts the same boot and workload on /dev/anon and on tmpfs, for devanon-report. Neither guest reports
/// free pages, so that both do the same work.
pub fn bench() -> Result<()> {
    ensure!(prepare(), "cannot prepare the VM");
    // The first guest also pays for one-time work of the host.
    let mut guest = on(1, Backing::File).start()?;
    guest.wait_up()?;
    guest.power_off()?;
    for (subject, backing) in [("tmpfs", Backing::File), ("ioctl", Backing::Anon)] {
        let value = instructions_of(without_reporting(backing), &["unpack", "compile", "forget"])?;
        println!(
            "{}",
            json!({"measure": {
                "name": "UML boot and workload",
                "operation": "a Debian guest boots, unpacks and checks sources, compiles, ends",
                "at": null,
                "subject": subject,
                "unit": "time",
                "value": value,
            }})
        );
    }
    Ok(())
}
