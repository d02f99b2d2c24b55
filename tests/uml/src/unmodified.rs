// SPDX-License-Identifier: GPL-2.0

//! Tests of Debian's unmodified UML on /dev/anon, started by devanon-run.

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

use crate::guest::DEBIAN_UML;
use crate::guest::DEVANON_RUN;
use crate::guest::Guest;
use crate::guest::Setup;
use crate::guest::USER;
use crate::host;
use crate::host::DEVICE;
use crate::host::Memory;
use crate::host::SHMEM_TOLERANCE;
use crate::ktap;
use crate::ktap::Test;
use crate::over;

const GUESTS: usize = 4;
/// Exists on a debug kernel.
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
/// How much the host's own caches grow when a program first runs, in KiB.
const CACHES: i64 = 4 << 10;
/// How much KASAN and kmemleak keep of their records of allocations, in KiB.
const DEBUG_RECORDS: i64 = 64 << 10;

/// State that is passed from test to test.
#[derive(Default)]
struct State {
    node_works: bool,
    before: Option<Memory>,
    guests: Vec<Guest>,
}

/// Returned by a test that needs the driver as a module.
const BUILT_IN: &str = "SKIP the driver is built in";

const TESTS: &[Test<State>] = &[
    ("devanon-run: no /dev/anon", no_device),
    ("devanon-run: a node without its driver", no_driver),
    (
        "devanon-run: a node opened before the module was loaded, and how to recover",
        stale_node,
    ),
    ("devanon-run: /dev/anon is another file", other_file),
    ("devanon-run: no permission", no_permission),
    (
        "devanon-run: writable and executable memory is denied",
        mdwe,
    ),
    ("devanon-run: a static program", static_program),
    ("devanon-run: a setuid program", setuid_program),
    ("devanon-run: neither a program nor a script", not_a_program),
    ("devanon-run: no such command", no_command),
    (
        "devanon-run: a program that never creates a memory file",
        not_used,
    ),
    ("devanon-run: UML cannot create its memory file", no_file),
    (
        "four guests boot as an unprivileged user, one with /dev mounted noexec",
        boot,
    ),
    (
        "two guests unpack the workload and find every file correct",
        workload,
    ),
    ("the guests' memory is on /dev/anon", on_device),
    (
        "the guests hold more than /tmp and /dev/shm could",
        more_than_tmp,
    ),
    (
        "SIGKILL: the host gets every page of the guest back",
        killed,
    ),
    ("the files of a surviving guest are still correct", survivor),
    (
        "shutdown: the host gets every page of the guest back",
        shut_down,
    ),
    ("devanon-run forwards SIGTERM", terminated),
    ("all guests gone: the host's memory is as before", all_back),
    (
        "a file mapped over half of a program's pages: the host gets that half back",
        map_over,
    ),
    ("the module unloads", unload),
];

pub fn run(node_works: bool, only: Option<&str>) -> bool {
    let mut state = State {
        node_works,
        ..State::default()
    };
    ktap::run(TESTS, only, &mut state)
}

/// devanon-run as the unprivileged user.
fn devanon_run(command: &[&str]) -> Command {
    let mut run = Command::new(DEVANON_RUN);
    run.args(command).uid(USER).gid(USER);
    run
}

/// It must exit with this status. Returns its stderr.
fn exits_with(run: &mut Command, status: i32) -> Result<String> {
    let output = run.output().context(DEVANON_RUN)?;
    let stderr = String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned();
    ensure!(
        output.status.code() == Some(status),
        "{}, expected {status}: {stderr}",
        output.status
    );
    Ok(stderr)
}

/// It must exit with this status, and one line that contains this sentence.
fn command_fails(run: &mut Command, status: i32, sentence: &str) -> Result<String> {
    let stderr = exits_with(run, status)?;
    ensure!(
        stderr.lines().count() == 1
            && stderr.starts_with("devanon-run: ")
            && stderr.contains(sentence),
        "expected one line with \"{sentence}\": {stderr}"
    );
    Ok(format!("{status}: {stderr}"))
}

fn fails(command: &[&str], status: i32, sentence: &str) -> Result<String> {
    command_fails(&mut devanon_run(command), status, sentence)
}

fn no_device(_: &mut State) -> Result<String> {
    ensure!(!host::module_is_loaded()?, "the module is loaded already");
    if host::driver_is_present()? {
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
    if host::driver_is_present()? {
        return Ok(BUILT_IN.to_owned());
    }
    host::make_node()?;
    fails(&["linux.uml"], 120, "its driver is not loaded")
}

/// On a patched kernel the node of the previous test works. On a stock kernel it must be recreated.
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
    not_used(state).context("after recreating the node")?;
    Ok(format!("{text}\n{gone}"))
}

fn other_file(_: &mut State) -> Result<String> {
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
fn mdwe(_: &mut State) -> Result<String> {
    let mut run = devanon_run(&["linux.uml"]);
    // SAFETY: between fork and exec the child makes only one system call, which affects itself.
    unsafe {
        run.pre_exec(|| {
            let refuse = libc::PR_MDWE_REFUSE_EXEC_GAIN;
            match libc::prctl(libc::PR_SET_MDWE, refuse, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
    command_fails(&mut run, 122, "MemoryDenyWriteExecute=")
}

fn static_program(_: &mut State) -> Result<String> {
    fails(&["/bin/busybox", "true"], 123, "statically linked")
}

fn setuid_program(_: &mut State) -> Result<String> {
    let program = "/privileged";
    fs::copy(DEBIAN_UML, program)?;
    host::chmod(program, 0o4755)?;
    let result = fails(&[program, "--version"], 123, "setuid");
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
        &[DEBIAN_UML, "--version"],
        124,
        "without taking a memory file from /dev/anon",
    )
}

/// With one descriptor left, /dev/anon can be opened, but the ioctl fails.
fn no_file(_: &mut State) -> Result<String> {
    let program = "/tmp/few-files";
    fs::write(
        program,
        format!("#!/bin/sh\nulimit -n 5\nexec {DEBIAN_UML}\n"),
    )?;
    host::chmod(program, 0o755)?;
    let result = exits_with(&mut devanon_run(&[program]), 1);
    fs::remove_file(program)?;
    let stderr = result?;
    for sentence in [
        "devanon: cannot get a memory file from /dev/anon: Too many open files",
        "devanon-run: /tmp/few-files ended without taking a memory file from /dev/anon",
    ] {
        ensure!(
            stderr.contains(sentence),
            "expected \"{sentence}\": {stderr}"
        );
    }
    Ok(String::new())
}

fn boot(state: &mut State) -> Result<String> {
    host::shrink_caches()?;
    state.before = Some(Memory::now()?);
    // UML executes code from its memory file. A noexec /dev must not prevent that.
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
    // In guest 2 the first process exits before there is any other. Then no process of the guest maps
    // the page of UML's system call stub.
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

/// Checks that all guests are running: the tests would pass vacuously without them.
fn check_all_running(state: &State) -> Result<()> {
    let number = state.guests.len();
    ensure!(number == GUESTS, "{number} guests, expected {GUESTS}");
    Ok(())
}

fn workload(state: &mut State) -> Result<String> {
    check_all_running(state)?;
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
    check_all_running(state)?;
    let before = state.before.context("no guest was started")?;
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
    text += &format!("total {total} KiB, Shmem grew by {grown} KiB\n");
    ensure!(
        (grown - total).abs() <= SHMEM_TOLERANCE,
        "{text}more than {SHMEM_TOLERANCE} KiB apart"
    );
    Ok(text)
}

fn more_than_tmp(state: &mut State) -> Result<String> {
    let (tmp_used, tmp) = host::filesystem_usage("/tmp")?;
    let (shm_used, shm) = host::filesystem_usage("/dev/shm")?;
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
        "{total} KiB; /tmp and /dev/shm have {tmp} + {shm} KiB, of which {tmp_used} + {shm_used} are in use"
    ))
}

/// Ends a guest and checks that Shmem falls by its cost.
fn check_given_back(state: &mut State, end: fn(&mut Guest) -> Result<()>) -> Result<String> {
    let mut guest = state.guests.pop().context("no guest")?;
    let resident = guest.memory()?.cost;
    let before = Memory::now()?;
    end(&mut guest)?;
    let after = Memory::wait_shmem(before.shmem - resident)?;
    Ok(format!(
        "held {resident} KiB, Shmem fell by {} KiB",
        before.shmem - after.shmem
    ))
}

fn killed(state: &mut State) -> Result<String> {
    check_given_back(state, |guest| {
        guest.kill(Signal::KILL)?;
        guest.wait(&[128 + 9])
    })
}

fn survivor(state: &mut State) -> Result<String> {
    let guest = state.guests.last_mut().context("no guest")?;
    guest.say("check")?;
    guest.wait_workload()?;
    Ok(String::new())
}

fn shut_down(state: &mut State) -> Result<String> {
    check_given_back(state, Guest::power_off)
}

fn terminated(state: &mut State) -> Result<String> {
    check_given_back(state, |guest| {
        guest.kill_run(Signal::TERM)?;
        // UML exits by itself on SIGTERM.
        guest.wait(&[1])
    })
}

fn all_back(state: &mut State) -> Result<String> {
    let before = state.before.context("no guest was started")?;
    for mut guest in state.guests.drain(..) {
        guest.power_off()?;
    }
    host::shrink_caches()?;
    let after = Memory::wait_shmem(before.shmem)?;
    let text = format!(
        "Shmem {} KiB, then {}; free {} KiB, then {}",
        before.shmem, after.shmem, before.free, after.free
    );
    let grown = if fs::exists(KMEMLEAK)? {
        DEBUG_RECORDS
    } else {
        CACHES
    };
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
    if !host::module_is_loaded()? {
        return Ok(BUILT_IN.to_owned());
    }
    host::unload_module()?;
    // The tests created the node by hand, so they remove it.
    host::remove_node()?;
    Ok(String::new())
}
