// SPDX-License-Identifier: GPL-2.0

//! Debian's unmodified UML on /dev/anon, by devanon-run.

use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::mount::MountFlags;
use rustix::mount::UnmountFlags;
use rustix::mount::mount_bind;
use rustix::mount::mount_remount;
use rustix::mount::unmount;
use rustix::process::Signal;

use crate::guest::Guest;
use crate::guest::RUN;
use crate::guest::Setup;
use crate::guest::UML;
use crate::guest::USER;
use crate::host;
use crate::host::DEVICE;
use crate::host::Memory;
use crate::host::SHMEM_TOLERANCE;
use crate::ktap;
use crate::ktap::Test;
use crate::over;

const GUESTS: usize = 4;
/// There on a debug kernel.
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
/// The host's own caches grow a little when a program runs for the first time. In KiB.
const CACHES: i64 = 4 << 10;
/// What KASAN and kmemleak noted of whom memory belonged to, they keep. In KiB.
const NOTES: i64 = 64 << 10;

/// What passes from one test to the next.
#[derive(Default)]
struct State {
    node_works: bool,
    before: Option<Memory>,
    guests: Vec<Guest>,
}

/// What a test returns that cannot be run because the driver is built in.
const BUILT_IN: &str = "SKIP the driver is built in";

const TESTS: &[Test<State>] = &[
    ("devanon-run: no /dev/anon", no_device),
    ("devanon-run: a node without its driver", no_driver),
    (
        "devanon-run: a node opened before the module was loaded, and the cure",
        stale_node,
    ),
    ("devanon-run: something else under the name", other_device),
    ("devanon-run: no permission", no_permission),
    (
        "devanon-run: memory may not be written and executed",
        no_execution,
    ),
    ("devanon-run: a static program", static_program),
    ("devanon-run: a setuid program", setuid_program),
    ("devanon-run: neither a program nor a script", not_a_program),
    ("devanon-run: no such command", no_command),
    (
        "devanon-run: a program that never asks for memory",
        not_used,
    ),
    ("devanon-run: a UML that gets no memory file", no_file),
    (
        "four guests boot as an unprivileged user, one with /dev mounted noexec",
        boot,
    ),
    (
        "two guests unpack their workload and find every file right",
        workload,
    ),
    ("the guests' memory is on /dev/anon", on_device),
    (
        "the guests hold more than /tmp and /dev/shm could",
        more_than_tmp,
    ),
    ("SIGKILL: every page of the guest is back", killed),
    ("the files of a guest that stays are still right", survivors),
    ("shutdown: every page of the guest is back", shut_down),
    ("devanon-run passes SIGTERM on", terminated),
    ("all guests gone: the host's memory is as before", all_back),
    (
        "a file mapped over half of a program's pages: the host has that half back",
        map_over,
    ),
    ("the module unloads", unload),
];

pub fn run(node_works: bool) -> bool {
    let mut state = State {
        node_works,
        ..State::default()
    };
    ktap::run(TESTS, &mut state)
}

/// devanon-run as the unprivileged user.
fn devanon_run(command: &[&str]) -> Command {
    let mut run = Command::new(RUN);
    run.args(command).uid(USER).gid(USER);
    run
}

/// It must exit so; what it said.
fn exits(run: &mut Command, status: i32) -> Result<String> {
    let output = run.output().context(RUN)?;
    let stderr = String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned();
    ensure!(
        output.status.code() == Some(status),
        "{}, wanted {status}: {stderr}",
        output.status
    );
    Ok(stderr)
}

/// It must exit so and say this, in one line.
fn fails_as(run: &mut Command, status: i32, sentence: &str) -> Result<String> {
    let stderr = exits(run, status)?;
    ensure!(
        stderr.lines().count() == 1
            && stderr.starts_with("devanon-run: ")
            && stderr.contains(sentence),
        "wanted one line with \"{sentence}\": {stderr}"
    );
    Ok(format!("{status}: {stderr}"))
}

fn fails(command: &[&str], status: i32, sentence: &str) -> Result<String> {
    fails_as(&mut devanon_run(command), status, sentence)
}

fn no_device(_: &mut State) -> Result<String> {
    ensure!(!host::is_module()?, "the module is loaded already");
    if host::is_driver_there()? {
        return Ok(BUILT_IN.to_owned());
    }
    host::remove_node()?;
    fails(
        &["linux.uml"],
        120,
        "/dev/anon does not exist; load the module first",
    )
}

fn no_driver(_: &mut State) -> Result<String> {
    if host::is_driver_there()? {
        return Ok(BUILT_IN.to_owned());
    }
    host::make_node()?;
    fails(&["linux.uml"], 120, "its driver is not loaded")
}

/// On a patched kernel the node of the test before works; on a stock one it has to be made anew.
fn stale_node(state: &mut State) -> Result<String> {
    host::load_module()?;
    let text = if state.node_works {
        not_used(state)?
    } else {
        fails(
            &["linux.uml"],
            120,
            "rm /dev/anon; mknod -m 666 /dev/anon c 1 10",
        )?
    };
    host::remove_node()?;
    let gone = fails(
        &["linux.uml"],
        120,
        "the driver is present but /dev/anon does not exist: mknod",
    )?;
    host::make_node()?;
    not_used(state).context("after the cure")?;
    Ok(format!("{text}\n{gone}"))
}

fn other_device(_: &mut State) -> Result<String> {
    host::remove_node()?;
    File::create(DEVICE)?;
    host::chmod(DEVICE, 0o666)?;
    let result = fails(&["linux.uml"], 120, "not the devanon device");
    host::remove_node()?;
    host::make_node()?;
    result
}

fn no_permission(_: &mut State) -> Result<String> {
    host::chmod(DEVICE, 0o600)?;
    let result = fails(&["linux.uml"], 121, "chmod 666 /dev/anon");
    host::chmod(DEVICE, 0o666)?;
    result
}

/// As under systemd's MemoryDenyWriteExecute=.
fn no_execution(_: &mut State) -> Result<String> {
    let mut run = devanon_run(&["linux.uml"]);
    // SAFETY: between fork and exec there is only one system call, on the child itself.
    unsafe {
        run.pre_exec(|| {
            let refuse = libc::PR_MDWE_REFUSE_EXEC_GAIN;
            match libc::prctl(libc::PR_SET_MDWE, refuse, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
    fails_as(&mut run, 122, "MemoryDenyWriteExecute=")
}

fn static_program(_: &mut State) -> Result<String> {
    fails(&["/bin/busybox", "true"], 123, "statically linked")
}

fn setuid_program(_: &mut State) -> Result<String> {
    let program = "/setuid";
    fs::copy(RUN, program)?;
    host::chmod(program, 0o4755)?;
    let result = fails(&[program, "--help"], 123, "setuid");
    fs::remove_file(program)?;
    result
}

fn not_a_program(_: &mut State) -> Result<String> {
    let program = "/tmp/text";
    fs::write(program, "some text\n")?;
    host::chmod(program, 0o755)?;
    let result = fails(&[program], 123, "neither an ELF program nor a script");
    fs::remove_file(program)?;
    result
}

fn no_command(_: &mut State) -> Result<String> {
    fails(&["no-such-command"], 127, "command not found")
}

fn not_used(_: &mut State) -> Result<String> {
    fails(
        &[RUN, "--help"],
        124,
        "without taking a memory file from /dev/anon",
    )
}

/// With one descriptor left, /dev/anon can be opened but makes no file.
fn no_file(_: &mut State) -> Result<String> {
    let program = "/tmp/few-files";
    fs::write(program, format!("#!/bin/sh\nulimit -n 5\nexec {UML}\n"))?;
    host::chmod(program, 0o755)?;
    let result = exits(&mut devanon_run(&[program]), 1);
    fs::remove_file(program)?;
    let stderr = result?;
    for sentence in [
        "devanon: cannot get a memory file from /dev/anon: Too many open files",
        "devanon-run: /tmp/few-files ended without taking a memory file from /dev/anon",
    ] {
        ensure!(stderr.contains(sentence), "wanted \"{sentence}\": {stderr}");
    }
    Ok(String::new())
}

fn boot(state: &mut State) -> Result<String> {
    host::shrink_caches()?;
    state.before = Some(Memory::now()?);
    // UML runs from the memory it gets, and a noexec /dev could be thought to forbid that.
    mount_bind("/dev", "/dev").context("binding /dev")?;
    let noexec = mount_remount("/dev", MountFlags::BIND | MountFlags::NOEXEC, "")
        .context("remounting /dev")
        .and_then(|()| {
            let mut guest = Setup::unmodified(1).start()?;
            guest.wait_up()?;
            Ok(guest)
        });
    unmount("/dev", UnmountFlags::DETACH)?;
    state.guests.push(noexec?);
    // The second one starts with a process that ends before there is any other: the page of
    // UML's system call stub is then mapped by nobody.
    for (number, arguments) in [(2, &["rdinit=/broken"][..]), (3, &[]), (GUESTS, &[])] {
        state
            .guests
            .push(Setup::unmodified(number).with(arguments).start()?);
    }
    for guest in &mut state.guests[1..] {
        guest.wait_up()?;
    }
    for guest in &state.guests {
        ensure!(
            guest.user()? == USER.to_string(),
            "{} runs as another user",
            guest.name
        );
    }
    Ok(String::new())
}

/// All guests are there: without any, the tests would have nothing to find wrong.
fn all_there(state: &State) -> Result<()> {
    let number = state.guests.len();
    ensure!(number == GUESTS, "{number} guests, wanted {GUESTS}");
    Ok(())
}

fn workload(state: &mut State) -> Result<String> {
    all_there(state)?;
    let busy = &mut state.guests[GUESTS - 2..];
    for guest in &mut *busy {
        guest.say("unpack")?;
    }
    for guest in busy {
        guest.wait_workload()?;
    }
    Ok(String::new())
}

fn on_device(state: &mut State) -> Result<String> {
    all_there(state)?;
    let before = state.before.context("the guests never started")?;
    let mut text = String::new();
    let mut total = 0;
    for guest in &state.guests {
        let memory = guest.memory()?;
        let mappings = guest.mappings()?;
        ensure!(mappings > 0, "{} maps nothing of /dev/anon", guest.name);
        ensure!(
            memory.cost > 8 << 10,
            "{} has only {} KiB",
            guest.name,
            memory.cost
        );
        total += memory.cost;
        text += &format!(
            "{}: {} KiB in {mappings} mappings\n",
            guest.name, memory.cost
        );
    }
    let grown = Memory::now()?.shmem - before.shmem;
    text += &format!("sum {total} KiB, Shmem grew by {grown} KiB\n");
    ensure!(
        (grown - total).abs() <= SHMEM_TOLERANCE,
        "{text}more than {SHMEM_TOLERANCE} KiB apart"
    );
    Ok(text)
}

fn more_than_tmp(state: &mut State) -> Result<String> {
    let (tmp_used, tmp) = host::filesystem("/tmp")?;
    let (shm_used, shm) = host::filesystem("/dev/shm")?;
    let mut total = 0;
    for guest in &state.guests {
        total += guest.memory()?.cost;
    }
    ensure!(total > tmp + shm, "{total} KiB fit into /tmp and /dev/shm");
    ensure!(
        tmp_used < 1024 && shm_used < 1024,
        "{tmp_used} KiB of /tmp, {shm_used} of /dev/shm"
    );
    Ok(format!(
        "{total} KiB against {tmp} + {shm}, of which {tmp_used} + {shm_used} are in use"
    ))
}

/// Ends a guest and checks that Shmem falls by what the guest held.
fn give_back(state: &mut State, end: fn(&mut Guest) -> Result<()>) -> Result<String> {
    let mut guest = state.guests.pop().context("no guest")?;
    let resident = guest.memory()?.cost;
    let before = Memory::now()?;
    end(&mut guest)?;
    let after = Memory::with_shmem(before.shmem - resident)?;
    Ok(format!(
        "held {resident} KiB, Shmem fell by {} KiB",
        before.shmem - after.shmem
    ))
}

fn killed(state: &mut State) -> Result<String> {
    give_back(state, |guest| {
        guest.kill(Signal::KILL)?;
        guest.wait(&[128 + 9])
    })
}

fn survivors(state: &mut State) -> Result<String> {
    let guest = state.guests.last_mut().context("no guest")?;
    guest.say("check")?;
    guest.wait_workload()?;
    Ok(String::new())
}

fn shut_down(state: &mut State) -> Result<String> {
    give_back(state, Guest::power_off)
}

fn terminated(state: &mut State) -> Result<String> {
    give_back(state, |guest| {
        guest.kill_run(Signal::TERM)?;
        // UML ends by itself when it gets this signal.
        guest.wait(&[1])
    })
}

fn all_back(state: &mut State) -> Result<String> {
    let before = state.before.context("the guests never started")?;
    for mut guest in state.guests.drain(..) {
        guest.power_off()?;
    }
    host::shrink_caches()?;
    let after = Memory::with_shmem(before.shmem)?;
    let text = format!(
        "Shmem {} KiB, then {}; free {} KiB, then {}",
        before.shmem, after.shmem, before.free, after.free
    );
    let grown = if fs::exists(KMEMLEAK)? { NOTES } else { CACHES };
    ensure!(before.free - after.free <= grown, "{text}");
    Ok(text)
}

fn map_over(_: &mut State) -> Result<String> {
    let mut text = String::new();
    over::run(|what, memory| {
        text += &format!("{what}: Shmem {}, free {} KiB\n", memory.shmem, memory.free);
    })?;
    Ok(text)
}

fn unload(state: &mut State) -> Result<String> {
    state.guests.clear();
    if !host::is_module()? {
        return Ok(BUILT_IN.to_owned());
    }
    host::unload_module()?;
    // The node was made by hand, so it is ours to remove.
    host::remove_node()?;
    Ok(String::new())
}
