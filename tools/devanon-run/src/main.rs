// SPDX-License-Identifier: GPL-2.0

//! Runs an unmodified User-Mode Linux with its memory on `/dev/anon`.

mod command;
mod device;

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::ExitStatus;
use std::thread;

use clap::Parser;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::poll;
use rustix::fs::fstat;
use rustix::io::FdFlags;
use rustix::io::fcntl_setfd;
use rustix::net::AddressFamily;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::socketpair;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::Signal;
use rustix::process::getpgid;
use rustix::process::pidfd_open;
use rustix::process::pidfd_send_signal;
use signal_hook::consts::SIGHUP;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGQUIT;
use signal_hook::consts::SIGTERM;
use signal_hook::consts::SIGUSR1;
use signal_hook::consts::SIGUSR2;
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::origin::WithOrigin;
use signal_hook::low_level::siginfo::Cause;

const LIBRARY: &str = "libdevanon_preload.so";
const REPORT_ENV: &str = "DEVANON_RUN_REPORT";
/// UML creates its memory file as it starts; if that takes longer than this, warn.
const REPORT_TIMEOUT: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// Run User-Mode Linux with its memory on /dev/anon
///
/// The command is an unmodified, dynamically linked UML (such as Debian's linux.uml), or a script
/// that starts one. UML keeps its memory in a temporary file; devanon-run replaces that file with
/// one from /dev/anon, so the sizes and mount options of /tmp and /dev/shm do not matter.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Exit status: that of the command, 128+N if signal N killed it, or
    2  usage error
  120  /dev/anon does not exist or does not work
  121  no permission to open /dev/anon
  122  memory that is both writable and executable is denied
  123  cannot preload into the command: static, setuid, or not x86-64
  124  the command exited with 0, but never took a memory file from /dev/anon
  125  devanon-run failed in another way
  126  the command cannot be executed
  127  the command was not found

Files: libdevanon_preload.so, in the directory of devanon-run or in ../lib/devanon relative to it.
Without devanon-run: LD_PRELOAD=/path/to/libdevanon_preload.so linux.uml ..."
)]
struct Args {
    /// The UML to run, and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// An error message and the exit status for it.
struct Failure {
    status: u8,
    text: String,
}

impl Failure {
    fn new(status: u8, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(125, error.to_string())
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// Returns the preload library's path, in a form that `LD_PRELOAD` accepts.
fn library() -> Result<PathBuf, Failure> {
    let program = env::current_exe()?;
    let here = program.parent().unwrap_or(Path::new("/"));
    let candidates = [
        here.join(LIBRARY),
        here.join("../lib/devanon").join(LIBRARY),
    ];
    let found = candidates
        .iter()
        .find(|path| path.is_file())
        .ok_or_else(|| {
            let text = format!(
                "cannot find {LIBRARY} next to {} or in ../lib/devanon",
                program.display()
            );
            Failure::new(125, text)
        })?;
    let found = found.canonicalize()?;
    // LD_PRELOAD is a list separated by colons or spaces, which cannot be quoted.
    if found.to_string_lossy().contains([':', ' ']) {
        let text = format!(
            "{} cannot be preloaded: its path contains a colon or a space",
            found.display()
        );
        return Err(Failure::new(125, text));
    }
    Ok(found)
}

/// Forwards signals to the command, except those that it also got from the terminal.
fn forward_signals(signals: &mut SignalsInfo<WithOrigin>, command: &OwnedFd, pid: Pid) {
    for origin in signals.forever() {
        let from_terminal = origin.cause == Cause::Kernel;
        if from_terminal && getpgid(Some(pid)) == getpgid(None) {
            continue;
        }
        if let Some(signal) = Signal::from_named_raw(origin.signal) {
            // Fails only if the command has exited.
            let _ = pidfd_send_signal(command, signal);
        }
    }
}

/// Waits until one of the descriptors is readable. Returns false on timeout.
fn readable(fds: &[&OwnedFd], timeout: Timespec) -> bool {
    let mut fds: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::IN))
        .collect();
    matches!(poll(&mut fds, Some(&timeout)), Ok(1..))
}

/// Returns the exit status for devanon-run. Warns if UML never took its memory file.
fn exit_code(status: ExitStatus, used: bool, path: &Path) -> u8 {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, signal) => 128 + signal.unwrap_or(0) as u8,
    };
    if used {
        return code;
    }
    eprintln!(
        "devanon-run: {} ended without taking a memory file from /dev/anon",
        path.display()
    );
    if code == 0 { 124 } else { code }
}

fn run(command: &[OsString]) -> Result<u8, Failure> {
    device::check()?;
    let library = library()?;
    let path = command::find(&command[0])?;
    command::check(&path)?;

    // The far end stays open in the command. This is a datagram socket: a report stays readable
    // after its sender has closed.
    let (report, far) = socketpair(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    fcntl_setfd(&far, FdFlags::empty())?;
    let inode = fstat(&far)?.st_ino;

    let mut preload = library.into_os_string();
    if let Some(others) = env::var_os("LD_PRELOAD").filter(|list| !list.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    let signals =
        SignalsInfo::<WithOrigin>::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2])?;

    let mut child = Command::new(&path)
        .arg0(&command[0])
        .args(&command[1..])
        .env("LD_PRELOAD", preload)
        .env(REPORT_ENV, format!("{}:{inode}", far.as_raw_fd()))
        .spawn()
        .map_err(|error| Failure::new(126, format!("cannot run {}: {error}", path.display())))?;
    drop(far);

    let result = supervise(&mut child, signals, &report, &path);
    if result.is_err() {
        // Do not leave the command running unsupervised.
        let _ = child.kill();
        let _ = child.wait();
    }
    result
}

/// Supervises the command until it exits.
fn supervise(
    child: &mut Child,
    mut signals: SignalsInfo<WithOrigin>,
    report: &OwnedFd,
    path: &Path,
) -> Result<u8, Failure> {
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let target = pidfd.try_clone()?;
    thread::Builder::new().spawn(move || forward_signals(&mut signals, &target, pid))?;

    if !readable(&[report, &pidfd], REPORT_TIMEOUT) {
        eprintln!(
            "devanon-run: {} has not taken a memory file from /dev/anon yet",
            path.display()
        );
    }
    let status = child.wait()?;
    let used = readable(
        &[report],
        Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
    );
    Ok(exit_code(status, used, path))
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args.command) {
        Ok(status) => status.into(),
        Err(failure) => {
            eprintln!("devanon-run: {}", failure.text);
            failure.status.into()
        }
    }
}
