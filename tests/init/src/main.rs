// SPDX-License-Identifier: GPL-2.0

//! PID 1 of the test VM.
//!
//! The kernel passes it the words after `--` on the kernel command line: one command, each word
//! percent-encoded (the kernel's own quoting is lossy), or the single word `--shell`. PID 1 mounts
//! what a test needs, runs the command with its standard output on the virtio port
//! `org.devanon.verdict` and its standard error on the console, and powers the machine off.
//!
//! PID 1 itself writes these lines to the port:
//!
//! ```text
//! devanon-init: started
//! …the command's own output…
//! devanon-init: status 0           exit status, 128 + signal number, 126/127 if not started
//! devanon-init: leaks 0            leaks kmemleak found after the command; only if it is enabled
//! devanon-init: taint 0 3000       /proc/sys/kernel/tainted before and after, hexadecimal
//! ```
//!
//! or `devanon-init: error TEXT` if it could not run the command, or if a detector gave up. Data on a
//! virtio port is lost if the machine powers off too early, so after the last line PID 1 waits for
//! one byte from the host.
//!
//! kmemleak's report goes to the console. KCSAN is turned on for the command if it was off.
//!
//! The command has no time limit here: the runner handles a command that hangs.

use std::ffi::OsString;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::ExitStatusExt;
use std::panic;
use std::path::Path;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::ptr;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::poll;
use rustix::mount::MountFlags;
use rustix::mount::mount;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::WaitOptions;
use rustix::system::RebootCommand;
use rustix::system::reboot;

/// The name the runner gives to the port.
const PORT: &str = "org.devanon.verdict";

/// Time limit for the port to appear: its driver announces it from a work queue.
const PORT_LIMIT: Duration = Duration::from_secs(10);

/// Time limit for the host to confirm that it has read everything.
const HOST_LIMIT: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// Type, mount point and options of each mount. /tmp and /dev/shm are small on purpose: a guest's
/// memory on /dev/anon must not depend on them.
const MOUNTS: [(&str, &str, &str); 8] = [
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", ""),
    ("tmpfs", "/tmp", "size=8m,mode=1777"),
    ("tmpfs", "/dev/shm", "size=8m,mode=1777"),
    ("devpts", "/dev/pts", "ptmxmode=0666"),
    ("cgroup2", "/sys/fs/cgroup", ""),
    ("debugfs", "/sys/kernel/debug", ""),
];

const KCSAN: &str = "/sys/kernel/debug/kcsan";

/// Kernel functions whose known races KCSAN must not report. They occur with any tmpfs.
const KCSAN_KNOWN: [&str; 1] = [
    // Reads mapping->nrpages with READ_ONCE(); writers hold the lock, but use plain stores.
    "shmem_recalc_inode",
];
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
/// kmemleak reports no object younger than five seconds. In hundredths of a second, the unit of
/// times(2).
const LEAK_AGE: i64 = 600;

/// Number of lines of kmemleak's report to show.
const REPORT_LINES: usize = 400;

fn main() {
    if std::process::id() != 1 {
        eprintln!("devanon-init: only runs as PID 1 of the test VM");
        std::process::exit(2);
    }

    // PID 1 must not exit, so after a panic it powers the machine off as well.
    if panic::catch_unwind(run).is_err() {
        eprintln!("devanon-init: panicked");
    }
    rustix::fs::sync();
    // Without ACPI the machine cannot power off, but with QEMU's -no-reboot a restart ends it.
    if let Err(error) = reboot(RebootCommand::Restart) {
        eprintln!("devanon-init: cannot restart: {error}");
    }
    loop {
        thread::park();
    }
}

fn run() {
    let words: Vec<OsString> = std::env::args_os().skip(1).map(decode).collect();
    let mounted = mount_all();

    if words == ["--shell"] {
        if let Err(error) = mounted.and_then(|()| shell()) {
            eprintln!("devanon-init: {error}");
        }
        return;
    }

    let mut port = match open_port() {
        Ok(port) => port,
        Err(error) => {
            eprintln!("devanon-init: no verdict port: {error}");
            return;
        }
    };
    report(&mut port, "devanon-init: started");
    match mounted.and_then(|()| command(&words, &port)) {
        // The command may have left its last line unfinished.
        Ok(verdict) => report(&mut port, &format!("\n{verdict}")),
        Err(error) => report(&mut port, &format!("\ndevanon-init: error {error}")),
    }

    let mut wait = [PollFd::new(&port, PollFlags::IN)];
    if !matches!(poll(&mut wait, Some(&HOST_LIMIT)), Ok(1)) {
        eprintln!("devanon-init: the host did not confirm that it read the verdict");
    }
}

/// Undoes the runner's percent-encoding. A `%` without a number is dropped: it encodes an empty word.
fn decode(word: OsString) -> OsString {
    let word = word.into_vec();
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word.as_slice();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            plain.push(byte);
            continue;
        }
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        if let Some(value) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            plain.push(value);
            rest = &tail[2..];
        }
    }
    OsString::from_vec(plain)
}

fn mount_all() -> Result<(), String> {
    for (kind, place, options) in MOUNTS {
        let options = std::ffi::CString::new(options).expect("no NUL in a constant");
        fs::create_dir_all(place)
            .and_then(|()| {
                mount(kind, place, kind, MountFlags::empty(), options.as_c_str())
                    .map_err(io::Error::from)
            })
            .map_err(|error| format!("cannot mount {kind} on {place}: {error}"))?;
    }
    Ok(())
}

/// Opens the port named [`PORT`] once its driver has announced it.
fn open_port() -> io::Result<File> {
    let start = Instant::now();
    loop {
        match find_port() {
            Err(error) if start.elapsed() > PORT_LIMIT => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(5)),
            Ok(port) => return Ok(port),
        }
    }
}

fn find_port() -> io::Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))?.trim() == PORT {
            return File::options()
                .read(true)
                .write(true)
                .open(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::other(format!("{PORT} not found")))
}

fn report(port: &mut File, line: &str) {
    // The console is the only other place for the error, and is always kept.
    if let Err(error) = writeln!(port, "{line}") {
        eprintln!("devanon-init: cannot write to the verdict port: {error}: {line}");
    }
}

/// Runs the command, and returns the verdict's lines.
fn command(words: &[OsString], port: &File) -> Result<String, String> {
    let (program, args) = words.split_first().ok_or("no command was given")?;
    let stdout = port.try_clone().map_err(|error| error.to_string())?;
    let kcsan = Path::new(KCSAN);
    if kcsan.exists() {
        let commands = KCSAN_KNOWN.iter().map(|function| format!("!{function}"));
        for command in commands.chain(["on".to_owned()]) {
            fs::write(kcsan, &command).map_err(|error| format!("{KCSAN}: {command}: {error}"))?;
        }
    }
    // Only leaks of the command count, and no automatic scan may look for them first.
    let has_kmemleak = kmemleak("scan=off")? && kmemleak("clear")?;
    let before = taint()?;
    let status = match environment(Command::new(program))
        .args(args)
        .stdin(Stdio::null())
        .stdout(stdout)
        .spawn()
    {
        Ok(child) => reap_until(Pid::from_child(&child))?,
        Err(error) => {
            eprintln!(
                "devanon-init: cannot start {}: {error}",
                program.to_string_lossy()
            );
            match error.kind() {
                io::ErrorKind::NotFound => 127,
                _ => 126,
            }
        }
    };
    kill_all();
    let leaks = if has_kmemleak {
        leaks()
    } else {
        Ok(String::new())
    };
    let (leaks, ()) = match (leaks, check_lockdep()) {
        (Err(one), Err(other)) => return Err(format!("{one}; {other}")),
        (leaks, lockdep) => (leaks?, lockdep?),
    };
    let after = taint()?;
    Ok(format!(
        "devanon-init: status {status}\n{leaks}devanon-init: taint {before:x} {after:x}"
    ))
}

/// Gives kmemleak a command. Returns false if the kernel has no kmemleak, an error if it is off.
fn kmemleak(order: &str) -> Result<bool, String> {
    if !Path::new(KMEMLEAK).exists() {
        return Ok(false);
    }
    fs::write(KMEMLEAK, order).map_err(|error| format!("kmemleak is off: {order}: {error}"))?;
    Ok(true)
}

/// Makes kmemleak look for leaks, shows them on the console, and returns the verdict's line.
fn leaks() -> Result<String, String> {
    // kmemleak measures age in ticks, and an emulated machine misses some.
    let start = ticks();
    while ticks() - start < LEAK_AGE {
        thread::sleep(Duration::from_millis(100));
    }
    // kmemleak does not report objects that changed since the last scan, so it takes two scans.
    kmemleak("scan")?;
    kmemleak("scan")?;
    let report = fs::read_to_string(KMEMLEAK).map_err(|error| format!("{KMEMLEAK}: {error}"))?;
    for line in report.lines().take(REPORT_LINES) {
        eprintln!("{line}");
    }
    let objects = report
        .lines()
        .filter(|line| line.starts_with("unreferenced object"));
    Ok(format!("devanon-init: leaks {}\n", objects.count()))
}

fn ticks() -> i64 {
    // SAFETY: With a null pointer, times(2) writes nothing.
    unsafe { libc::times(ptr::null_mut()) }
}

/// Fails if lockdep turned itself off, for example because its tables are full.
fn check_lockdep() -> Result<(), String> {
    let off = |line: &str| line.trim_start().starts_with("debug_locks:") && line.ends_with(" 0");
    match fs::read_to_string("/proc/lockdep_stats") {
        Ok(stats) if stats.lines().any(off) => Err("lockdep is off".into()),
        _ => Ok(()),
    }
}

fn environment(mut command: Command) -> Command {
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", "/root")
        .env("TERM", std::env::var_os("TERM").unwrap_or("linux".into()));
    command
}

/// Waits for `child`, and reaps every orphan that exits before it.
fn reap_until(child: Pid) -> Result<i32, String> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == child => {
                let status = ExitStatus::from_raw(status.as_raw());
                let signal = || 128 + status.signal().unwrap_or(0);
                return Ok(status.code().unwrap_or_else(signal));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => (),
            Err(error) => return Err(format!("cannot wait for the command: {error}")),
        }
    }
}

/// Kills all processes the command left running, so that their exit is part of the test as well.
fn kill_all() {
    // Group 1 means kill(-1), every process but this one; it fails only if there is none.
    let _ = rustix::process::kill_process_group(Pid::INIT, Signal::KILL);
    while rustix::process::wait(WaitOptions::empty()).is_ok() {}
}

fn taint() -> Result<u64, String> {
    const PATH: &str = "/proc/sys/kernel/tainted";
    let text = fs::read_to_string(PATH).map_err(|error| format!("{PATH}: {error}"))?;
    text.trim()
        .parse()
        .map_err(|error| format!("{PATH}: {error}"))
}

/// Loads the module, and runs a shell on the console.
fn shell() -> Result<(), String> {
    const MODULE: &str = "/lib/devanon/devanon.ko";
    let loaded = File::open(MODULE)
        .and_then(|module| rustix::system::finit_module(&module, c"", 0).map_err(io::Error::from));
    match loaded {
        Ok(()) => eprintln!("devanon-init: /dev/anon is ready; leave the shell to power off"),
        Err(error) => eprintln!("devanon-init: cannot load {MODULE}: {error}"),
    }

    let text = |error: io::Error| format!("cannot start the shell: {error}");
    // Its own session, with the console as controlling terminal, so that job control and ^C work.
    let child = environment(Command::new("setsid"))
        .args(["-c", "sh", "-l"])
        .stdin(File::open("/dev/ttyS0").map_err(text)?)
        .spawn()
        .map_err(text)?;
    reap_until(Pid::from_child(&child)).map(|_| ())
}
