// SPDX-License-Identifier: GPL-2.0

//! Tests of a Debian userland on our UML: its work must give correct results on every backing, while
//! free pages are reported and memory is unplugged and plugged.

use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::guest::Guest;
use crate::host;
use crate::host::Backing;
use crate::kernel::mount_room;
use crate::kernel::on;
use crate::kernel::prepare;
use crate::kernel::wait_reported;
use crate::ktap;
use crate::ktap::Test;

#[derive(Default)]
struct State {
    long: bool,
    here: bool,
    /// Of a large process on each backing: how many mappings it has, and how many are unmerged.
    mappings: Vec<(Backing, usize, usize)>,
}

const TESTS: &[Test<State>] = &[
    (
        "/dev/anon, ptrace: correct results while memory is unplugged and plugged",
        ptrace,
    ),
    ("/dev/anon, seccomp, two CPUs: the same", two_cpus),
    ("a temporary file, seccomp: the same", file),
    ("/dev/anon, seccomp: the same", seccomp),
    ("the device itself: the same", device),
    ("the host merges mappings as well as on tmpfs", mappings),
];

/// For a machine without /dev/anon.
const HERE_TESTS: &[Test<State>] = &[
    (
        "a memfd, ptrace: correct results while memory is unplugged and plugged",
        memfd,
    ),
    ("a memfd, seccomp, two CPUs: the same", memfd_two_cpus),
];

const LONG_ONLY: &str = "SKIP only in the long form";

pub fn run(long: bool, here: bool, only: Option<&str>) -> bool {
    let mut state = State {
        long,
        here,
        ..State::default()
    };
    if here {
        mount_room() && ktap::run(HERE_TESTS, only, &mut state)
    } else {
        prepare() && ktap::run(TESTS, only, &mut state)
    }
}

/// Runs work of each kind while a quarter of the memory is unplugged and plugged; then unplugs memory from
/// a guest that is full of page cache.
fn run_work(state: &mut State, backing: Backing, arguments: &[&str]) -> Result<String> {
    let setup = on(1, backing).with(arguments).size(256);
    // Booting all of Debian takes long in the VM.
    let setup = if state.long || state.here {
        setup.debian()
    } else {
        setup.single()
    };
    let mut guest = setup.start()?;
    guest.wait_up()?;
    guest.log_in()?;
    let seconds = if state.long { 30 } else { 5 };
    let mut cycles = 0;
    let words: &[&str] = if state.long || state.here {
        &[
            "compile",
            "unpack",
            "python",
            &format!("stress {seconds}"),
            "check",
        ]
    } else if backing == Backing::Anon {
        &["unpack", "check"]
    } else {
        &[]
    };
    for words in words {
        cycles += plug_while_it_works(&mut guest, "work", words, false)?;
    }
    let (most, unmerged) = large_process(&mut guest)?;
    state.mappings.push((backing, most, unmerged));
    let reclaimed = reclaim(&mut guest)?;
    guest.work("forget")?;
    let excess = wait_reported(&guest)?;
    guest.work("compile")?;
    guest.power_off()?;
    Ok(format!(
        "a quarter unplugged and plugged {cycles} times\n{reclaimed}\n\
         {most} mappings of a large process, {unmerged} of them unmerged\nin the end {excess} KiB more than in use"
    ))
}

/// Unplugs and plugs a quarter of the memory until the work is done, and returns how often. With `short`,
/// there may be less to unplug. Three quarters of the time are left to the work.
pub fn plug_while_it_works(
    guest: &mut Guest,
    program: &str,
    words: &str,
    short: bool,
) -> Result<usize> {
    let console = guest.mconsole()?;
    let quarter = guest.size() / 4;
    let mut cycles = 0;
    guest.begin(program, words)?;
    loop {
        let start = Instant::now();
        let (all, taken) = console.plug(-quarter)?;
        ensure!(all || short, "{words}: {taken:?}");
        // A request to plug nothing is an error.
        if taken.unplugged > 0 {
            let (all, given) = console.plug(taken.unplugged)?;
            ensure!(all && given.unplugged == 0, "{words}: {given:?}");
        }
        cycles += 1;
        let end = Instant::now() + 3 * start.elapsed();
        while Instant::now() < end {
            if guest.is_done(program, words)? {
                return Ok(cycles);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Starts a process with much memory in small pieces. Returns the largest number of mappings of guest memory
/// in any host process, and how many of them are unmerged.
fn large_process(guest: &mut Guest) -> Result<(usize, usize)> {
    guest.say(
        "python3 -c 'import time; x = [str(i) * 9 for i in range(600000)]; \
         print(\"large\", flush=True); time.sleep(9999)' &",
    )?;
    guest.expect("large")?;
    let mut most = (0, 0);
    for process in host::children(guest.pid())? {
        let (_, of_memory) = host::mappings(process)?;
        if of_memory > most.0 {
            most = (of_memory, host::unmerged(process)?);
        }
    }
    guest.say("kill $!; wait")?;
    Ok(most)
}

/// Fills the page cache, then unplugs more memory than is free.
fn reclaim(guest: &mut Guest) -> Result<String> {
    /// How much more than is free, in KiB.
    const MORE: i64 = 48 << 10;
    guest.say("cat /usr/bin/* /usr/lib/x86_64-linux-gnu/* >/dev/null 2>&1; echo read")?;
    guest.expect("read")?;
    let console = guest.mconsole()?;
    let free = host::field(&console.proc("meminfo")?, "MemFree")?;
    let (all, now) = console.plug(-(free + MORE))?;
    ensure!(all, "{now:?}, with {free} KiB free");
    let (all, now) = console.plug(free + MORE)?;
    ensure!(all && now.unplugged == 0, "{now:?}");
    Ok(format!(
        "{} KiB unplugged with {free} KiB free",
        free + MORE
    ))
}

fn ptrace(state: &mut State) -> Result<String> {
    run_long_work(state, Backing::Anon, &[])
}

fn two_cpus(state: &mut State) -> Result<String> {
    run_long_work(state, Backing::Anon, &["seccomp=on", "ncpus=2"])
}

fn file(state: &mut State) -> Result<String> {
    run_work(state, Backing::File, &["seccomp=on"])
}

fn run_long_work(state: &mut State, backing: Backing, arguments: &[&str]) -> Result<String> {
    if state.long {
        run_work(state, backing, arguments)
    } else {
        Ok(LONG_ONLY.to_owned())
    }
}

fn seccomp(state: &mut State) -> Result<String> {
    run_work(state, Backing::Anon, &["seccomp=on"])
}

fn device(state: &mut State) -> Result<String> {
    run_long_work(state, Backing::Device, &[])
}

fn memfd(state: &mut State) -> Result<String> {
    run_work(state, Backing::Memfd, &[])
}

fn memfd_two_cpus(state: &mut State) -> Result<String> {
    run_work(state, Backing::Memfd, &["seccomp=on", "ncpus=2"])
}

/// The placement of a guest's pages, and with it the number of mappings, varies between runs. So compare
/// the share of mappings that the host could merge but did not.
fn mappings(state: &mut State) -> Result<String> {
    let of = |backing| {
        let mut all = state.mappings.iter().filter(|(b, ..)| *b == backing);
        all.next().map(|(_, most, unmerged)| (*most, *unmerged))
    };
    let (anon, anon_unmerged) = of(Backing::Anon).context("no guest on /dev/anon")?;
    let (tmpfs, tmpfs_unmerged) = of(Backing::File).context("no guest on tmpfs")?;
    let text = format!(
        "/dev/anon: {anon_unmerged} of {anon} unmerged; tmpfs: {tmpfs_unmerged} of {tmpfs}"
    );
    ensure!(anon > 500 && tmpfs > 500, "{text}: too few to compare");
    let share = |unmerged: usize, all: usize| unmerged as f64 / all as f64;
    ensure!(
        share(anon_unmerged, anon) <= share(tmpfs_unmerged, tmpfs) + 0.01,
        "{text}"
    );
    Ok(text)
}
