// SPDX-License-Identifier: GPL-2.0

//! A Debian userland on our UML: the same work with the same results, wherever the memory is, while
//! free pages are reported and memory is taken and given back.

use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::guest::Guest;
use crate::host;
use crate::host::Backing;
use crate::kernel::make_room;
use crate::kernel::on;
use crate::kernel::prepare;
use crate::kernel::wait_reported;
use crate::ktap;
use crate::ktap::Test;

#[derive(Default)]
struct State {
    long: bool,
    here: bool,
    /// Of a large process: how many, and how many of them continue the one before.
    mappings: Vec<(Backing, usize, usize)>,
}

const TESTS: &[Test<State>] = &[
    (
        "/dev/anon, ptrace: the work is right while memory comes and goes",
        ptrace,
    ),
    (
        "/dev/anon, seccomp, two processors: the same",
        two_processors,
    ),
    ("a temporary file, seccomp: the same", file),
    ("/dev/anon, seccomp: the same", seccomp),
    ("/dev/anon itself: the same", device),
    (
        "a process has as many mappings on the host as on tmpfs",
        mappings,
    ),
];

/// On a machine without /dev/anon.
const HERE: &[Test<State>] = &[
    (
        "a memfd, ptrace: the work is right while memory comes and goes",
        memfd,
    ),
    (
        "a memfd, seccomp, two processors: the same",
        memfd_two_processors,
    ),
];

const LONG_ONLY: &str = "SKIP only in the long form";

pub fn run(long: bool, here: bool) -> bool {
    let mut state = State {
        long,
        here,
        ..State::default()
    };
    if here {
        make_room() && ktap::run(HERE, &mut state)
    } else {
        prepare() && ktap::run(TESTS, &mut state)
    }
}

/// Work of each kind, while a quarter of the memory goes and comes; then what a guest that is full
/// of page cache gives.
fn works(state: &mut State, backing: Backing, arguments: &[&str]) -> Result<String> {
    let setup = on(1, backing).with(arguments).size(256);
    // All that Debian starts takes long in the VM.
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
        "a quarter taken and given back {cycles} times\n{reclaimed}\n\
         {most} mappings of a large process, {unmerged} of them unmerged\nin the end {excess} KiB more than in use"
    ))
}

/// Takes a quarter of the memory and gives it back until the work is done; how often. Where memory is
/// short, there may be less to take. Three quarters of the time are left to the work.
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
        let begun = Instant::now();
        let (all, taken) = console.plug(-quarter)?;
        ensure!(all || short, "{words}: {taken:?}");
        // What there is not cannot be given back.
        if taken.unplugged > 0 {
            let (all, given) = console.plug(taken.unplugged)?;
            ensure!(all && given.unplugged == 0, "{words}: {given:?}");
        }
        cycles += 1;
        let end = Instant::now() + 3 * begun.elapsed();
        while Instant::now() < end {
            if guest.is_done(program, words)? {
                return Ok(cycles);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The most mappings that the host has of any process, while one has much memory in small pieces;
/// and how many of them could be one with the one before.
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

/// The guest reads files, and then more memory is taken than is free.
fn reclaim(guest: &mut Guest) -> Result<String> {
    /// In KiB.
    const MORE: i64 = 48 << 10;
    guest.say("cat /usr/bin/* /usr/lib/x86_64-linux-gnu/* >/dev/null 2>&1; echo read")?;
    guest.expect("read")?;
    let console = guest.mconsole()?;
    let free = host::field(&console.proc("meminfo")?, "MemFree")?;
    let (all, now) = console.plug(-(free + MORE))?;
    ensure!(all, "{now:?}, with {free} KiB free");
    let (all, now) = console.plug(free + MORE)?;
    ensure!(all && now.unplugged == 0, "{now:?}");
    Ok(format!("{} KiB taken where {free} were free", free + MORE))
}

fn ptrace(state: &mut State) -> Result<String> {
    only_long(state, Backing::Anon, &[])
}

fn two_processors(state: &mut State) -> Result<String> {
    only_long(state, Backing::Anon, &["seccomp=on", "ncpus=2"])
}

fn file(state: &mut State) -> Result<String> {
    works(state, Backing::File, &["seccomp=on"])
}

fn only_long(state: &mut State, backing: Backing, arguments: &[&str]) -> Result<String> {
    if state.long {
        works(state, backing, arguments)
    } else {
        Ok(LONG_ONLY.to_owned())
    }
}

fn seccomp(state: &mut State) -> Result<String> {
    works(state, Backing::Anon, &["seccomp=on"])
}

fn device(state: &mut State) -> Result<String> {
    only_long(state, Backing::Device, &[])
}

fn memfd(state: &mut State) -> Result<String> {
    works(state, Backing::Memfd, &[])
}

fn memfd_two_processors(state: &mut State) -> Result<String> {
    works(state, Backing::Memfd, &["seccomp=on", "ncpus=2"])
}

/// Where a guest's pages lie differs from run to run, and with it the number of mappings. What the
/// host merges on tmpfs and not on /dev/anon does not.
fn mappings(state: &mut State) -> Result<String> {
    let of = |wanted| {
        let mut all = state.mappings.iter().filter(|(b, ..)| *b == wanted);
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
