// SPDX-License-Identifier: GPL-2.0

//! Tests of our UML, patches/uml: where it keeps its memory, what it gives back, and memory hot-plug.

use std::fs;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::mount::MountFlags;
use rustix::mount::UnmountFlags;
use rustix::mount::mount;
use rustix::mount::mount_bind;
use rustix::mount::mount_remount;
use rustix::mount::unmount;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use rustix::pty::OpenptFlags;
use rustix::pty::grantpt;
use rustix::pty::openpt;
use rustix::pty::ptsname;
use rustix::pty::unlockpt;
use rustix::termios::Winsize;
use rustix::termios::tcsetwinsize;

use crate::guest::Guest;
use crate::guest::POWERED_OFF;
use crate::guest::Setup;
use crate::guest::USER;
use crate::host;
use crate::host::Backing;
use crate::host::DEVICE;
use crate::host::Memory;
use crate::ktap;
use crate::ktap::Place;
use crate::ktap::Test;
use crate::report;
use crate::sandbox;

/// A tmpfs for memory in temporary files, and for other large files: /dev/shm of the VM is too small.
pub const ROOM: &str = "/room";
/// How much more than the guest uses the host may pay once free pages have been reported, in KiB. Each
/// CPU keeps some free pages, and reporting stops when few are free.
const EXCESS: i64 = 8 << 10;
/// How long reporting may take. It starts after two seconds, and a long list takes up to sixteen rounds.
const REPORTING_TIMEOUT: Duration = Duration::from_secs(60);

struct State {
    /// Run on the machine itself, with only the backings that every host has.
    here: bool,
}

impl State {
    fn backings(&self) -> &'static [Backing] {
        if self.here {
            &[Backing::Memfd, Backing::File]
        } else {
            &[Backing::Anon, Backing::Device]
        }
    }
}

const TESTS: &[(Place, Test<State>)] = &[
    (Place::Vm, ("no /dev/anon: a memfd", no_device)),
    (
        Place::Vm,
        ("no permission to open /dev/anon: a memfd", no_permission),
    ),
    (
        Place::Vm,
        ("/dev/anon is another file: a memfd", other_file),
    ),
    (
        Place::Vm,
        ("/dev/anon: a file created by the ioctl", own_file),
    ),
    (
        Place::Vm,
        ("/dev mounted noexec: still a file of /dev/anon", noexec),
    ),
    (
        Place::Vm,
        ("ioctl denied by a sandbox: the device itself", no_ioctl),
    ),
    (
        Place::Vm,
        (
            "ioctl denied, /dev mounted noexec: a memfd",
            no_ioctl_noexec,
        ),
    ),
    (
        Place::Vm,
        (
            "ioctl and memfd denied, /dev mounted noexec: a temporary file",
            only_temporary_file,
        ),
    ),
    (
        Place::Vm,
        ("file size is limited: the device itself", small_files),
    ),
    (Place::Vm, ("physmem= selects the backing", physmem_option)),
    (
        Place::Vm,
        (
            "physmem=anon without /dev/anon: no boot, and the reason",
            physmem_anon_refused,
        ),
    ),
    (
        Place::Vm,
        (
            "a temporary file on a noexec mount: no boot, and the reason",
            noexec_temporary_file,
        ),
    ),
    (
        Place::Here,
        ("invalid options: no boot, and the reason", invalid_options),
    ),
    (
        Place::Both,
        ("ptrace: files are correct, free memory goes back", ptrace),
    ),
    (Place::Both, ("seccomp: the same, on two backings", seccomp)),
    (Place::Both, ("seccomp with two CPUs: the same", two_cpus)),
    (
        Place::Here,
        ("page_reporting=off: free memory stays", reporting_off),
    ),
    (
        Place::Here,
        (
            "page poisoning: free memory stays, and no corruption is reported",
            poisoned,
        ),
    ),
    (
        Place::Here,
        ("page_reporting=9: small free blocks stay", reporting_order),
    ),
    (
        Place::Both,
        (
            "half of the memory is unplugged and plugged while the guest works",
            hot_plug,
        ),
    ),
    (
        Place::Here,
        ("hot-plug: invalid requests are refused", hot_plug_refused),
    ),
    (
        Place::Here,
        (
            "a guest keeps working with as much unplugged as possible",
            all_unplugged,
        ),
    ),
    (
        Place::Here,
        ("hot-plug with two CPUs, on two backings", hot_plug_two_cpus),
    ),
    (
        Place::VmMore,
        ("hot-plug with two CPUs, on two backings", hot_plug_two_cpus),
    ),
    (
        Place::Here,
        (
            "the host kills a process of a guest: the guest goes on",
            process_killed,
        ),
    ),
    (Place::Vm, ("SIGKILL leaves nothing behind", killed)),
    (
        Place::VmMore,
        ("sixteen guests with a /dev/shm of 16 MiB", sixteen_guests),
    ),
    (
        Place::Here,
        (
            "a terminal as console: its helper maps no guest memory, and forwards window sizes",
            terminal,
        ),
    ),
    (Place::Vm, ("the module unloads", unload)),
];

pub fn run(here: bool, more: bool, only: Option<&str>) -> bool {
    let prepared = if here { mount_room() } else { prepare() };
    let tests = ktap::select(TESTS, here, more);
    prepared && ktap::run(&tests, only, &mut State { here })
}

/// Mounts the tmpfs for temporary files.
pub fn mount_room() -> bool {
    let mounted = fs::create_dir_all(ROOM).map_err(Into::into).and_then(|()| {
        mount(
            "room",
            ROOM,
            "tmpfs",
            MountFlags::empty(),
            c"size=1g,mode=1777",
        )
        .context(ROOM)
    });
    report(mounted)
}

/// Mounts the tmpfs for temporary files and loads the module.
pub fn prepare() -> bool {
    mount_room() && report(host::load_module())
}

/// Boots a guest and checks its backing, and the log lines that match "hysical memory".
fn boot(setup: Setup, backing: Backing, lines: &[&str]) -> Result<Guest> {
    let mut guest = setup.start()?;
    guest.wait_up()?;
    let is = guest.memory()?.backing;
    ensure!(is == backing, "memory is in {is:?}, expected {backing:?}");
    let log = guest.kernel_log("hysical.memory")?;
    ensure!(
        log.len() == lines.len() && log.iter().zip(lines).all(|(l, wanted)| l.ends_with(wanted)),
        "the log has {log:?}, expected {lines:?}"
    );
    Ok(guest)
}

/// The same, then shuts the guest down.
fn boot_and_stop(setup: Setup, backing: Backing, lines: &[&str]) -> Result<String> {
    boot(setup, backing, lines)?.power_off()?;
    Ok(lines.join("\n"))
}

/// Runs `body` with /dev mounted noexec.
fn with_noexec(body: impl FnOnce() -> Result<String>) -> Result<String> {
    mount_bind("/dev", "/dev").context("binding /dev")?;
    let result = mount_remount("/dev", MountFlags::BIND | MountFlags::NOEXEC, "")
        .context("remounting /dev")
        .and_then(|()| body());
    unmount("/dev", UnmountFlags::DETACH)?;
    result
}

const ON_FILE: &str = "Physical memory is in /dev/anon, a file of its own";
const ON_DEVICE: &str = "Physical memory is in /dev/anon, the device itself";
const ON_MEMFD: &str = "Physical memory is in a memfd";
const NOT_PERMITTED: &str = "Physical memory cannot be in /dev/anon: Operation not permitted";

fn no_device(_: &mut State) -> Result<String> {
    host::remove_node()?;
    let lines = [
        "Physical memory cannot be in /dev/anon: No such file or directory",
        ON_MEMFD,
    ];
    let result = boot_and_stop(Setup::ours(1), Backing::Memfd, &lines);
    host::make_node()?;
    result
}

fn no_permission(_: &mut State) -> Result<String> {
    host::chmod(DEVICE, 0o600)?;
    let lines = [
        "Physical memory cannot be in /dev/anon: Permission denied",
        ON_MEMFD,
    ];
    let result = boot_and_stop(Setup::ours(1), Backing::Memfd, &lines);
    host::chmod(DEVICE, 0o666)?;
    result
}

fn other_file(_: &mut State) -> Result<String> {
    host::remove_node()?;
    fs::write(DEVICE, "")?;
    host::chmod(DEVICE, 0o666)?;
    let lines = [
        "Physical memory cannot be in /dev/anon: No such device",
        ON_MEMFD,
    ];
    let result = boot_and_stop(Setup::ours(1), Backing::Memfd, &lines);
    host::remove_node()?;
    host::make_node()?;
    result
}

fn own_file(_: &mut State) -> Result<String> {
    boot_and_stop(Setup::ours(1), Backing::Anon, &[ON_FILE])
}

fn noexec(_: &mut State) -> Result<String> {
    with_noexec(|| boot_and_stop(Setup::ours(1), Backing::Anon, &[ON_FILE]))
}

fn no_ioctl(_: &mut State) -> Result<String> {
    let setup = Setup::ours(1).prepare(sandbox::no_ioctl);
    let mut guest = boot(setup, Backing::Device, &[ON_DEVICE])?;
    guest.say("unpack")?;
    guest.wait_workload()?;
    guest.power_off()?;
    Ok(String::new())
}

fn no_ioctl_noexec(_: &mut State) -> Result<String> {
    with_noexec(|| {
        let setup = Setup::ours(1).prepare(sandbox::no_ioctl);
        boot_and_stop(setup, Backing::Memfd, &[NOT_PERMITTED, ON_MEMFD])
    })
}

fn only_temporary_file(_: &mut State) -> Result<String> {
    with_noexec(|| {
        let setup = Setup::ours(1)
            .prepare(sandbox::no_memfd)
            .environment("TMPDIR", ROOM);
        let lines = [
            NOT_PERMITTED,
            "Physical memory cannot be in a memfd: Operation not permitted",
            "Physical memory is in /room",
        ];
        boot_and_stop(setup, Backing::File, &lines)
    })
}

fn small_files(_: &mut State) -> Result<String> {
    let setup = Setup::ours(1).prepare(sandbox::small_files);
    boot_and_stop(setup, Backing::Device, &[ON_DEVICE])
}

fn physmem_option(_: &mut State) -> Result<String> {
    for (backing, line) in [
        (Backing::Anon, ON_FILE),
        (Backing::Memfd, ON_MEMFD),
        (Backing::File, "Physical memory is in /room"),
    ] {
        boot_and_stop(on(1, backing), backing, &[line])?;
    }
    Ok(String::new())
}

/// A guest with its memory in this backing, selected by options.
pub fn on(number: usize, backing: Backing) -> Setup {
    let word = match backing {
        Backing::Anon | Backing::Device => "physmem=anon",
        Backing::Memfd => "physmem=memfd",
        Backing::File => "physmem=file",
    };
    let setup = Setup::ours(number).with(&[word]);
    match backing {
        Backing::Device => setup.prepare(sandbox::no_ioctl),
        Backing::File => setup.environment("TMPDIR", ROOM),
        Backing::Anon | Backing::Memfd => setup,
    }
}

/// UML must refuse to boot, with one line that contains this sentence.
fn refuses(setup: Setup, sentence: &str) -> Result<String> {
    let (status, stderr) = setup.run_to_exit()?;
    let said: Vec<&str> = stderr.lines().filter(|l| l.contains(sentence)).collect();
    ensure!(
        status == 1 && said.len() == 1,
        "status {status}, expected 1 and one line with \"{sentence}\": {stderr}"
    );
    Ok(said.concat())
}

fn physmem_anon_refused(_: &mut State) -> Result<String> {
    host::remove_node()?;
    let result = refuses(
        Setup::ours(1).with(&["physmem=anon"]),
        "Physical memory cannot be in /dev/anon: No such file or directory",
    );
    host::make_node()?;
    result
}

fn noexec_temporary_file(_: &mut State) -> Result<String> {
    mount_remount(ROOM, MountFlags::NOEXEC, "size=1g,mode=1777")?;
    let result = refuses(on(1, Backing::File), "/room must be not mounted noexec");
    mount_remount(ROOM, MountFlags::empty(), "size=1g,mode=1777")?;
    result
}

fn invalid_options(_: &mut State) -> Result<String> {
    let mut text = String::new();
    for (word, sentence) in [
        ("physmem=disk", "'disk', expected anon/memfd/file"),
        ("physmem=", "'', expected anon/memfd/file"),
        ("page_reporting=11", "'11', expected off or 0 to 10"),
        ("page_reporting=-1", "'-1', expected off or 0 to 10"),
        ("page_reporting=on", "'on', expected off or 0 to 10"),
    ] {
        text += &refuses(Setup::ours(1).with(&[word]), sentence)?;
        text += "\n";
    }
    Ok(text)
}

/// Waits until the host pays for at most [`EXCESS`] more than the guest uses.
pub fn wait_reported(guest: &Guest) -> Result<i64> {
    wait_excess(guest, EXCESS)
}

/// Waits until the host pays for at most `most` KiB more than the guest uses; negative means less.
pub fn wait_excess(guest: &Guest, most: i64) -> Result<i64> {
    wait_figure(
        guest,
        "what the host pays beyond what the guest uses",
        Guest::excess,
        most,
    )
}

/// Waits until a figure is at most `most` KiB twice in a row: pages that are being reported do not count
/// as free.
fn wait_figure(
    guest: &Guest,
    what: &str,
    figure: fn(&Guest) -> Result<i64>,
    most: i64,
) -> Result<i64> {
    let end = Instant::now() + REPORTING_TIMEOUT;
    let mut before = i64::MAX;
    loop {
        let now = figure(guest)?;
        if now.max(before) <= most {
            return Ok(now);
        }
        ensure!(
            Instant::now() < end,
            "{}: {what} is still {now} KiB, expected at most {most}",
            guest.name
        );
        before = now;
        thread::sleep(Duration::from_millis(500));
    }
}

/// On each backing: files are correct, and once they are removed the host gets their memory back.
fn check_reporting(backings: &[Backing], arguments: &[&str]) -> Result<String> {
    let mut guests = Vec::new();
    for (number, &backing) in (1..).zip(backings) {
        guests.push((backing, on(number, backing).with(arguments).start()?));
    }
    let mut text = String::new();
    for (_, guest) in &mut guests {
        guest.wait_up()?;
        guest.say("unpack")?;
    }
    for (_, guest) in &mut guests {
        guest.wait_workload()?;
    }
    for (backing, mut guest) in guests {
        let full = guest.memory()?.cost;
        ensure!(full > 30 << 10, "{backing:?}: only {full} KiB");
        guest.say("forget")?;
        guest.expect("guest: forgot")?;
        let excess = wait_reported(&guest)?;
        let cost = |guest: &Guest| Ok(guest.memory()?.cost);
        let after = wait_figure(&guest, "its cost", cost, full - (12 << 10))?;
        // Memory that was reported is usable again.
        guest.say("unpack")?;
        guest.wait_workload()?;
        guest.power_off()?;
        text += &format!("{backing:?}: {full} KiB, then {after}; {excess} more than in use\n");
    }
    Ok(text)
}

fn ptrace(state: &mut State) -> Result<String> {
    check_reporting(&state.backings()[..1], &[])
}

fn seccomp(state: &mut State) -> Result<String> {
    check_reporting(state.backings(), &["seccomp=on"])
}

fn two_cpus(state: &mut State) -> Result<String> {
    check_reporting(&state.backings()[..1], &["seccomp=on", "ncpus=2"])
}

/// Returns the excess some seconds after the guest has removed its files and dropped its caches.
fn excess_after_forget(arguments: &[&str]) -> Result<i64> {
    let mut guest = Setup::ours(1).with(arguments).start()?;
    guest.wait_up()?;
    guest.say("unpack")?;
    guest.wait_workload()?;
    guest.say("forget")?;
    guest.expect("guest: forgot")?;
    thread::sleep(Duration::from_secs(8));
    let excess = guest.excess()?;
    guest.power_off()?;
    Ok(excess)
}

fn reporting_off(_: &mut State) -> Result<String> {
    let excess = excess_after_forget(&["page_reporting=off"])?;
    ensure!(
        excess > EXCESS + (4 << 10),
        "only {excess} KiB more than in use"
    );
    Ok(format!("{excess} KiB more than in use"))
}

fn poisoned(_: &mut State) -> Result<String> {
    let mut guest = Setup::ours(1).with(&["page_poison=1"]).start()?;
    guest.wait_up()?;
    let log = guest.kernel_log("ree.memory.stays")?;
    ensure!(
        log.len() == 1 && log[0].ends_with("Free memory stays: it is poisoned"),
        "the log has {log:?}"
    );
    guest.say("unpack")?;
    guest.wait_workload()?;
    // Memory that was unplugged also reads as zeros when it is plugged again.
    plug_cycles(&mut guest, 2)?;
    ensure!(!guest.kernel_log("Linux.version")?.is_empty(), "no log");
    let log = guest.kernel_log("[Cc]orruption")?;
    ensure!(log.is_empty(), "{log:?}");
    guest.power_off()?;
    Ok(String::new())
}

fn reporting_order(_: &mut State) -> Result<String> {
    let all = excess_after_forget(&["page_reporting=0"])?;
    let large = excess_after_forget(&["page_reporting=9"])?;
    ensure!(
        all < large,
        "order 0: {all} KiB more than in use; order 9: {large}"
    );
    Ok(format!(
        "order 0: {all} KiB more than in use; order 9: {large}"
    ))
}

/// Unplugs half of the guest's memory and plugs it again while the guest checks its files.
fn plug_cycles(guest: &mut Guest, cycles: usize) -> Result<String> {
    let console = guest.mconsole()?;
    let half = guest.size() / 2;
    let total =
        |console: &crate::mconsole::Console| host::field(&console.proc("meminfo")?, "MemTotal");
    let before = total(&console)?;
    let whole = console.plugged()?;
    ensure!(whole.unplugged == 0, "{whole:?}");
    for _ in 0..cycles {
        guest.say("check")?;
        let (all, now) = console.plug(-half)?;
        ensure!(all && now.moved == half && now.unplugged == half, "{now:?}");
        ensure!(
            now == crate::mconsole::Plugged {
                moved: half,
                ..console.plugged()?
            },
            "{now:?}"
        );
        let cost = guest.memory()?.cost;
        ensure!(
            cost <= guest.size() - half,
            "{cost} KiB with half of it unplugged"
        );
        let balloon = host::field(&console.proc("meminfo")?, "Balloon")?;
        ensure!(balloon == half, "Balloon is {balloon} KiB");
        let small = total(&console)?;
        ensure!(
            small == before - half,
            "MemTotal {before}, then {small} KiB"
        );
        guest.wait_workload()?;

        guest.say("check")?;
        let (all, now) = console.plug(half)?;
        ensure!(all && now.moved == half && now.unplugged == 0, "{now:?}");
        ensure!(now.plugged == whole.plugged, "{now:?}, {whole:?}");
        guest.wait_workload()?;
    }
    let after = total(&console)?;
    ensure!(after == before, "MemTotal {before}, then {after} KiB");
    Ok(format!("{half} KiB, {cycles} times; MemTotal {before} KiB"))
}

fn hot_plug(state: &mut State) -> Result<String> {
    let mut guest = Setup::ours(1).size(256).start()?;
    guest.wait_up()?;
    guest.say("unpack")?;
    guest.wait_workload()?;
    let text = plug_cycles(&mut guest, if state.here { 10 } else { 4 })?;
    guest.power_off()?;
    Ok(text)
}

fn hot_plug_two_cpus(state: &mut State) -> Result<String> {
    for &backing in state.backings() {
        let setup = on(1, backing).size(256).with(&["seccomp=on", "ncpus=2"]);
        let mut guest = setup.start()?;
        guest.wait_up()?;
        guest.say("unpack")?;
        guest.wait_workload()?;
        plug_cycles(&mut guest, 2).with_context(|| format!("{backing:?}"))?;
        guest.power_off()?;
    }
    Ok(String::new())
}

fn hot_plug_refused(_: &mut State) -> Result<String> {
    let mut guest = Setup::ours(1).start()?;
    guest.wait_up()?;
    let console = guest.mconsole()?;
    let mut text = String::new();
    for (words, sentence) in [
        ("mem=64M", "start with '-' or '+'"),
        ("mem=-64Q", "parse memory increment"),
        ("mem=-", "multiple of the page size"),
        ("mem=-0", "multiple of the page size"),
        ("mem=-1000", "multiple of the page size"),
        ("mem=+4097", "multiple of the page size"),
        ("mem=--4096", "parse memory increment"),
    ] {
        match console.ask(&format!("config {words}"))? {
            Err(said) if said.contains(sentence) => text += &format!("{words}: {said}\n"),
            answer => anyhow::bail!("{words}: {answer:?}, expected \"{sentence}\""),
        }
    }
    // Nothing is unplugged, so nothing can be plugged.
    let (all, now) = console.plug(4)?;
    ensure!(!all && now.moved == 0 && now.unplugged == 0, "{now:?}");
    // More than the guest has: by far, and by a little.
    let more = format!("mem=+{}K", now.plugged + (1 << 10));
    for words in ["mem=-8000000000000M", &more] {
        let answer = console.ask(&format!("config {words}"))?;
        let refused = matches!(&answer, Err(said) if said.contains("larger than physical memory"));
        ensure!(refused, "{words}: {answer:?}");
    }
    // Nothing moves while the guest is stopped.
    for (words, good) in [
        ("stop", true),
        ("config mem=-4M", false),
        ("config mem", false),
        ("go", true),
    ] {
        let answer = console.ask(words)?;
        ensure!(answer.is_ok() == good, "{words}: {answer:?}");
    }
    // Everything: unplugs as much as possible, and plugs it again.
    let (all, now) = console.plug(-guest.size())?;
    ensure!(!all && now.moved > 0, "{now:?}");
    let taken = now.unplugged;
    let (all, now) = console.plug(taken)?;
    ensure!(all && now.moved == taken && now.unplugged == 0, "{now:?}");
    guest.say("unpack")?;
    guest.wait_workload()?;
    guest.power_off()?;
    Ok(text)
}

fn all_unplugged(_: &mut State) -> Result<String> {
    let mut guest = Setup::ours(1).start()?;
    guest.wait_up()?;
    guest.say("unpack")?;
    guest.wait_workload()?;
    let console = guest.mconsole()?;
    let (all, now) = console.plug(-guest.size())?;
    ensure!(!all && now.moved == now.unplugged, "{now:?}");
    // Asked again, it finds next to nothing.
    let (all, more) = console.plug(-(16 << 10))?;
    ensure!(!all && more.moved < 4 << 10, "{more:?}");
    let meminfo = console.proc("meminfo")?;
    let available = host::field(&meminfo, "MemAvailable")?;
    ensure!(
        (4 << 10..12 << 10).contains(&available),
        "{available} KiB are available"
    );
    for _ in 0..3 {
        guest.say("check")?;
        guest.wait_workload()?;
    }
    ensure!(!guest.kernel_log("Linux.version")?.is_empty(), "no log");
    let killed = guest.kernel_log("[Kk]ill")?;
    ensure!(killed.is_empty(), "{killed:?}");
    let cost = guest.memory()?.cost;
    let (all, now) = console.plug(console.plugged()?.unplugged)?;
    ensure!(all, "{now:?}");
    guest.power_off()?;
    Ok(format!(
        "{} KiB unplugged, {available} KiB available, the host pays {cost} KiB",
        now.moved
    ))
}

fn process_killed(_: &mut State) -> Result<String> {
    for arguments in [&[][..], &["seccomp=on"]] {
        let mut guest = Setup::ours(1).with(arguments).start()?;
        guest.wait_up()?;
        guest.say("unpack")?;
        guest.wait_workload()?;
        let before = host::children(guest.pid())?;
        guest.say("sleeper")?;
        guest.expect("guest: sleeper")?;
        let sleeper = host::children(guest.pid())?
            .into_iter()
            .find(|pid| !before.contains(pid))
            .context("the sleeper has no process on the host")?;
        kill_process(Pid::from_raw(sleeper).context("PID 0")?, Signal::KILL)?;
        guest.say("wake")?;
        guest.expect("guest: awake")?;
        guest.say("check")?;
        guest.wait_workload()?;
        guest.power_off()?;
    }
    wait_no_processes()
}

/// Waits until no process of the guests' user is left.
fn wait_no_processes() -> Result<String> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let left = host::processes(USER)?;
        if left.is_empty() {
            return Ok(String::new());
        }
        ensure!(Instant::now() < end, "processes {left:?} are left");
        thread::sleep(Duration::from_millis(50));
    }
}

fn killed(_: &mut State) -> Result<String> {
    let mut text = String::new();
    for (backing, arguments) in [
        (Backing::Anon, &[][..]),
        (Backing::Device, &["seccomp=on"]),
        (Backing::Anon, &["seccomp=on", "ncpus=2"]),
    ] {
        let before = Memory::now()?;
        let mut guest = on(1, backing).with(arguments).start()?;
        guest.wait_up()?;
        guest.say("unpack")?;
        guest.wait_workload()?;
        let held = guest.memory()?.cost;
        guest.kill(Signal::KILL)?;
        guest.wait(&[128 + 9])?;
        wait_no_processes()?;
        let after = Memory::wait_shmem(before.shmem)?;
        text += &format!(
            "{arguments:?}: held {held} KiB; Shmem {} KiB, then {}\n",
            before.shmem, after.shmem
        );
    }
    Ok(text)
}

fn sixteen_guests(_: &mut State) -> Result<String> {
    const GUESTS: usize = 16;
    mount_remount("/dev/shm", MountFlags::empty(), "size=16m,mode=1777")?;
    let before = Memory::now()?;
    let mut guests = Vec::new();
    for number in 1..=GUESTS {
        guests.push(Setup::ours(number).size(128).start()?);
    }
    let mut total = 0;
    for guest in &mut guests {
        guest.wait_up()?;
    }
    // Four of them run the workload.
    for guest in &mut guests[..4] {
        guest.say("unpack")?;
    }
    for guest in &mut guests[..4] {
        guest.wait_workload()?;
    }
    for (number, guest) in guests.iter().enumerate() {
        let cost = guest.memory()?.cost;
        let least = if number < 4 { 30 << 10 } else { 4 << 10 };
        ensure!(cost > least, "{}: only {cost} KiB", guest.name);
        total += cost;
    }
    let (used, size) = host::filesystem_usage("/dev/shm")?;
    ensure!(
        size == 16 << 10 && used < 1024,
        "/dev/shm: {used} of {size} KiB"
    );
    for guest in &mut guests {
        guest.power_off()?;
    }
    drop(guests);
    Memory::wait_shmem(before.shmem)?;
    mount_remount("/dev/shm", MountFlags::empty(), "size=8m,mode=1777")?;
    Ok(format!("{total} KiB in all"))
}

fn terminal(_: &mut State) -> Result<String> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let theirs = rustix::fs::open(
        ptsname(&ours, Vec::new())?.as_c_str(),
        OFlags::RDWR | OFlags::NOCTTY,
        Mode::empty(),
    )?;
    rustix::fs::fchown(
        &theirs,
        Some(rustix::fs::Uid::from_raw(USER)),
        Some(rustix::fs::Gid::from_raw(USER)),
    )?;
    let keyboard = fs::File::from(ours.try_clone()?);
    let mut guest = Setup::ours(1).terminal(keyboard, theirs).start()?;
    guest.wait_up()?;

    let helpers: Vec<i32> = host::children(guest.pid())?
        .into_iter()
        .filter(|pid| {
            fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("linux"))
        })
        .collect();
    ensure!(
        helpers.len() == 1,
        "{} helpers, expected one",
        helpers.len()
    );
    let (_, of_helper) = host::mappings(helpers[0])?;
    let (_, of_guest) = host::mappings(guest.pid())?;
    ensure!(
        of_helper == 0 && of_guest > 0,
        "{of_helper} mappings of guest memory in the helper, {of_guest} in UML"
    );

    for (rows, columns) in [(31, 97), (25, 80)] {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&ours, size)?;
        let wanted = format!("{rows} {columns}");
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            guest.say("size")?;
            let is = guest.expect("guest: size")?;
            if is == wanted {
                break;
            }
            ensure!(
                Instant::now() < end,
                "the guest's console is {is}, expected {wanted}"
            );
            thread::sleep(Duration::from_millis(200));
        }
    }
    guest.say("poweroff")?;
    guest.wait(POWERED_OFF)?;
    wait_no_processes()
}

fn unload(_: &mut State) -> Result<String> {
    if !host::module_is_loaded()? {
        return Ok(format!("{}the driver is built in", ktap::SKIP));
    }
    host::unload_module()?;
    host::remove_node()?;
    Ok(String::new())
}
