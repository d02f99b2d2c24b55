// SPDX-License-Identifier: GPL-2.0

//! A UML guest, run as an unprivileged user.

use std::fs;
use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;

use crate::host;
use crate::host::MemoryFile;
use crate::host::memory_file;
use crate::mconsole::Console;

/// Debian's, unmodified.
pub const DEBIAN_UML: &str = "/bin/linux.uml";
/// Ours: linux-source with patches/uml.
pub const OUR_UML: &str = "/bin/linux";
pub const DEVANON_RUN: &str = "/bin/devanon-run";
pub const USER: u32 = 1000;
/// Default memory size of a guest, in MiB.
pub const SIZE: u32 = 192;

const FILES: &str = "/lib/devanon";
/// Disk image of the Debian userland. Not every VM has it.
pub const IMAGE: &str = "/lib/devanon/debian.img";
/// How long to wait for one answer: more than any guest needs on a slow machine with a debug kernel.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
/// How long a program in a guest may take: more than any needs while other guests are busy.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(1200);
/// UML's exit statuses after power off. With any backing, UML occasionally aborts after its last message,
/// when its processes are already gone.
pub const POWERED_OFF: &[i32] = &[0, 128 + 6];

/// What runs in a guest.
#[derive(Clone, Copy, PartialEq)]
pub enum Userland {
    /// tests/guest/init on busybox, in an initramfs.
    Small,
    /// Debian with systemd, on a copy-on-write disk.
    Debian,
    /// The same disk with just a shell: tests/guest/single.
    Single,
}

impl Userland {
    fn has_disk(self) -> bool {
        self != Self::Small
    }
}

/// How to start a guest.
pub struct Setup {
    name: String,
    program: Vec<String>,
    userland: Userland,
    size: u32,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    /// Runs in the child before it becomes UML.
    prepare: Option<fn() -> io::Result<()>>,
    /// Both ends of the console's terminal, ours first.
    terminal: Option<(File, OwnedFd)>,
}

impl Setup {
    /// Debian's UML on /dev/anon, started by devanon-run.
    pub fn unmodified(number: usize) -> Self {
        Self::new(number, &[DEVANON_RUN, DEBIAN_UML])
    }

    /// Our own UML.
    pub fn ours(number: usize) -> Self {
        Self::new(number, &[OUR_UML])
    }

    fn new(number: usize, program: &[&str]) -> Self {
        Self {
            name: format!("g{number}"),
            program: program.iter().map(|&word| word.to_owned()).collect(),
            userland: Userland::Small,
            size: SIZE,
            arguments: Vec::new(),
            environment: Vec::new(),
            prepare: None,
            terminal: None,
        }
    }

    pub fn debian(mut self) -> Self {
        self.userland = Userland::Debian;
        self
    }

    pub fn single(mut self) -> Self {
        self.userland = Userland::Single;
        self
    }

    /// In MiB.
    pub fn size(mut self, size: u32) -> Self {
        self.size = size;
        self
    }

    /// Adds arguments to UML's command line.
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|&word| word.to_owned()));
        self
    }

    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn prepare(mut self, prepare: fn() -> io::Result<()>) -> Self {
        self.prepare = Some(prepare);
        self
    }

    /// Uses a terminal as console: our end of it, and the guest's.
    pub fn terminal(mut self, ours: File, theirs: OwnedFd) -> Self {
        self.terminal = Some((ours, theirs));
        self
    }

    /// The program and the arguments that callers have added.
    pub fn command_line(&self) -> String {
        [&self.program[..], &self.arguments[..]].concat().join(" ")
    }

    fn directory(&self) -> PathBuf {
        PathBuf::from(format!("/tmp/{}", self.name))
    }

    fn command(&mut self) -> Result<Command> {
        let directory = self.directory();
        fs::create_dir_all(&directory)?;
        chown(&directory, Some(USER), Some(USER))?;
        // The guest's processes take turns. Keeping them on one CPU avoids an IPI on each switch,
        // which is slow where CPUs are emulated.
        let several = self.arguments.iter().any(|word| word.starts_with("ncpus="));
        let number: usize = self.name[1..].parse()?;
        let cpu = number % thread::available_parallelism()?;
        let mut command = Command::new("taskset");
        command
            .arg(if several {
                "ff".to_owned()
            } else {
                format!("{:x}", 1 << cpu)
            })
            .args(&self.program)
            .arg(format!("mem={}M", self.size))
            .arg(format!("umid={}", self.name))
            .arg(format!("uml_dir={}", directory.display()))
            .args(["quiet", "loglevel=4", "con=null"]);
        if self.userland.has_disk() {
            command
                .arg(format!("ubd0=/var/{}.cow,{IMAGE}", self.name))
                .args(["root=/dev/ubda", "rw"])
                .args(["console=ttyS0", "ssl=null", "ssl0=fd:0,fd:1"]);
        }
        match self.userland {
            Userland::Small => {
                command
                    .arg(format!("initrd={FILES}/guest.cpio"))
                    .arg(match self.terminal {
                        Some(_) => "con0=fd:0",
                        None => "con0=fd:0,fd:1",
                    })
            }
            Userland::Debian => command
                .arg("systemd.show_status=0")
                // On a slow host, services and the console device, which the login prompt waits for,
                // exceed systemd's default timeouts.
                .args([
                    "systemd.default_device_timeout_sec=900",
                    "systemd.default_timeout_start_sec=900",
                    "systemd.service_watchdogs=no",
                ]),
            Userland::Single => command.arg("init=/usr/local/bin/single"),
        };
        command
            .args(&self.arguments)
            .env_clear()
            .env("PATH", "/bin")
            .env("HOME", &directory)
            .envs(self.environment.iter().cloned())
            .uid(USER)
            .gid(USER);
        if let Some(prepare) = self.prepare {
            // SAFETY: the functions passed here only make system calls that affect the child.
            unsafe { command.pre_exec(prepare) };
        }
        if self.userland.has_disk() {
            // Not in /tmp, which is small.
            fs::create_dir_all("/var")?;
            host::chmod("/var", 0o777)?;
            let _ = fs::remove_file(format!("/var/{}.cow", self.name));
        }
        Ok(command)
    }

    /// Runs a UML that is expected to exit soon. Returns its exit status and stderr.
    pub fn run_to_exit(mut self) -> Result<(i32, String)> {
        let output = self.command()?.stdin(Stdio::null()).output()?;
        let code = output.status.code().context("killed")?;
        Ok((code, String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    pub fn start(mut self) -> Result<Guest> {
        let mut command = self.command()?;
        let terminal = self.terminal.take();
        let (ours, stdin, stdout) = match terminal {
            Some((ours, theirs)) => (Some(ours), theirs.into(), Stdio::null()),
            None => (None, Stdio::piped(), Stdio::piped()),
        };
        let mut run = command
            .stdin(stdin)
            .stdout(stdout)
            .spawn()
            .context("taskset")?;
        drop(command);
        let (keyboard, mut screen) = match ours {
            Some(ours) => (ours.try_clone()?, ours),
            None => {
                let stdin = run.stdin.take().context("no console")?;
                let stdout = run.stdout.take().context("no console")?;
                (
                    File::from(OwnedFd::from(stdin)),
                    File::from(OwnedFd::from(stdout)),
                )
            }
        };
        let (chunks, console) = channel();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(size @ 1..) = screen.read(&mut chunk) {
                if chunks.send(chunk[..size].to_vec()).is_err() {
                    break;
                }
            }
        });
        // With devanon-run this is its own PID. wait_up() replaces it by that of UML.
        let uml = Pid::from_child(&run);
        Ok(Guest {
            directory: self.directory().join(&self.name),
            by_devanon_run: self.program[0] == DEVANON_RUN,
            name: self.name,
            userland: self.userland,
            size: self.size,
            run,
            uml,
            keyboard,
            console,
            output: String::new(),
            consumed: 0,
            program_start: Instant::now(),
        })
    }
}

pub struct Guest {
    pub name: String,
    /// The directory of its management console.
    directory: PathBuf,
    by_devanon_run: bool,
    userland: Userland,
    size: u32,
    run: Child,
    /// UML itself: a child of devanon-run, or the process we started.
    uml: Pid,
    keyboard: File,
    console: Receiver<Vec<u8>>,
    /// All console output, and how much of it has been consumed.
    output: String,
    consumed: usize,
    /// When the current program was started.
    program_start: Instant,
}

impl Guest {
    /// Waits until `find` succeeds on the console output not yet consumed. It returns how much to consume,
    /// and what it found.
    fn wait_for<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<(usize, T)>) -> Result<T> {
        let end = Instant::now() + ANSWER_TIMEOUT;
        let why = loop {
            if let Some((size, found)) = find(&self.output[self.consumed..]) {
                self.consumed += size;
                return Ok(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.console.recv_timeout(left) {
                Ok(chunk) => self.output += &String::from_utf8_lossy(&chunk),
                Err(RecvTimeoutError::Timeout) => {
                    host::show_threads(self.pid());
                    break "in time";
                }
                Err(RecvTimeoutError::Disconnected) => break "before its console closed",
            }
        };
        self.show_tail();
        bail!("{}: no \"{what}\" {why}", self.name)
    }

    /// Waits for the next line that starts with `prefix`, and returns the rest of it.
    pub fn expect(&mut self, prefix: &str) -> Result<String> {
        self.wait_for(prefix, |text| {
            let mut at = 0;
            for line in text.split_inclusive('\n') {
                at += line.len();
                let rest = line.trim_start_matches('\r').strip_prefix(prefix);
                if let Some(rest) = rest.filter(|_| line.ends_with('\n')) {
                    return Some((at, rest.trim().to_owned()));
                }
            }
            None
        })
    }

    /// Waits for this text anywhere in a line.
    fn expect_text(&mut self, wanted: &str) -> Result<()> {
        self.wait_for(wanted, |text| {
            text.find(wanted).map(|at| (at + wanted.len(), ()))
        })
    }

    /// Prints the last lines of the console, to debug a failure.
    fn show_tail(&mut self) {
        for chunk in self.console.try_iter() {
            self.output += &String::from_utf8_lossy(&chunk);
        }
        let lines: Vec<&str> = self.output.lines().collect();
        for line in &lines[lines.len().saturating_sub(30)..] {
            eprintln!("{}: {line}", self.name);
        }
    }

    /// Waits until the guest's user space is up: with Debian, until the login prompt.
    pub fn wait_up(&mut self) -> Result<()> {
        match self.userland {
            Userland::Small | Userland::Single => {
                self.expect("guest: up")?;
            }
            Userland::Debian => {
                self.expect_text("guest login: ")?;
                eprintln!("{}: login prompt", self.name);
            }
        }
        if self.by_devanon_run {
            let children = host::children(Pid::from_child(&self.run).as_raw_pid())?;
            let child = children.first().context("devanon-run has no child")?;
            self.uml = Pid::from_raw(*child).context("PID 0")?;
        }
        Ok(())
    }

    /// Logs in to Debian if necessary, and makes the shell quiet: no echo, no prompt.
    pub fn log_in(&mut self) -> Result<()> {
        if self.userland == Userland::Debian {
            self.say("root")?;
        }
        self.expect_text("# ")?;
        self.say("stty -echo; PS1= exec sh")?;
        self.say("echo; echo ready")?;
        self.expect("ready")?;
        Ok(())
    }

    /// Runs the script `work` of tests/guest in the Debian userland. It must succeed.
    pub fn work(&mut self, words: &str) -> Result<()> {
        self.run("work", words)
    }

    /// Runs `work` or `disk` of tests/guest. It must succeed.
    pub fn run(&mut self, program: &str, words: &str) -> Result<()> {
        self.begin(program, words)?;
        self.finish(program, words)
    }

    /// Runs a shell command in the Debian userland and returns its lines of output.
    pub fn output_of(&mut self, command: &str) -> Result<Vec<String>> {
        self.say(&format!(
            "{command} | sed 's/^/line /'; echo; echo line end"
        ))?;
        let mut lines = Vec::new();
        loop {
            let line = self.expect("line ")?;
            if line == "end" {
                return Ok(lines);
            }
            lines.push(line);
        }
    }

    /// Waits for the end of a program that `begin` started. It must succeed.
    pub fn finish(&mut self, program: &str, words: &str) -> Result<()> {
        while !self.is_done(program, words)? {
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Starts `work` or `disk` of tests/guest without waiting for its end: see [`Guest::is_done`].
    pub fn begin(&mut self, program: &str, words: &str) -> Result<()> {
        let word = words.split(' ').next().unwrap_or_default();
        self.program_start = Instant::now();
        // A killed program prints no verdict. If the program printed one, that comes first and counts.
        self.say(&format!(
            "{program} {words} || echo \"{program}: {word} ended with $?\""
        ))
    }

    fn check_verdict(&mut self, program: &str, words: &str) -> Result<()> {
        let word = words.split(' ').next().unwrap_or_default();
        let answer = self.expect(&format!("{program}: {word} "))?;
        if !answer.starts_with("ok") {
            self.show_tail();
            bail!("{}: {program} {words}: {answer}", self.name);
        }
        eprintln!("{}: {program} {words}: {answer}", self.name);
        Ok(())
    }

    /// Returns true once the program has ended. It must succeed, and within [`PROGRAM_TIMEOUT`].
    pub fn is_done(&mut self, program: &str, words: &str) -> Result<bool> {
        for chunk in self.console.try_iter() {
            self.output += &String::from_utf8_lossy(&chunk);
        }
        let prefix = format!("{program}: ");
        let unread = &self.output[self.consumed..];
        let done = unread.starts_with(&prefix) || unread.contains(&format!("\n{prefix}"));
        if done {
            self.check_verdict(program, words)?;
        } else if self.program_start.elapsed() > PROGRAM_TIMEOUT {
            host::show_threads(self.pid());
            self.show_tail();
            bail!("{}: {program} {words} has not ended in time", self.name);
        }
        Ok(done)
    }

    /// Waits until the guest has ended, and returns the rest of the last complete line that starts with `prefix`.
    pub fn last_line(&mut self, prefix: &str) -> Result<String> {
        loop {
            match self.console.recv_timeout(ANSWER_TIMEOUT) {
                Ok(chunk) => self.output += &String::from_utf8_lossy(&chunk),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!("{}: its console is still open", self.name),
            }
        }
        let lines = self.output.split_inclusive('\n').rev();
        let mut found = lines.filter_map(|line| line.strip_suffix('\n')?.strip_prefix(prefix));
        let rest = found
            .next()
            .with_context(|| format!("no line \"{prefix}\""))?;
        Ok(rest.trim().to_owned())
    }

    /// The COW file of a Debian guest. Dropping the guest removes it.
    pub fn cow_file(&self) -> String {
        format!("/var/{}.cow", self.name)
    }

    /// Waits for the verdict on the workload: all files of workload.sha256 must be correct.
    pub fn wait_workload(&mut self) -> Result<()> {
        let files = fs::read_to_string(format!("{FILES}/workload.sha256"))?
            .lines()
            .count();
        let answer = self.expect("guest: workload")?;
        if answer != format!("ok {files} files") {
            bail!("{}: workload: {answer}, expected {files} files", self.name);
        }
        Ok(())
    }

    /// Types a line on the console.
    pub fn say(&self, line: &str) -> Result<()> {
        writeln!(&self.keyboard, "{line}").with_context(|| format!("{}: console", self.name))
    }

    pub fn memory(&self) -> Result<MemoryFile> {
        memory_file(self.uml.as_raw_pid())?
            .with_context(|| format!("{} has no memory file", self.name))
    }

    pub fn mconsole(&self) -> Result<Console> {
        Console::open(&self.directory)
    }

    /// Returns the lines of the small guest's kernel log that match this pattern.
    pub fn kernel_log(&mut self, pattern: &str) -> Result<Vec<String>> {
        self.say(&format!("log {pattern}"))?;
        let mut lines = Vec::new();
        loop {
            let line = self.expect("guest: log")?;
            if line == "end" {
                return Ok(lines);
            }
            lines.push(line);
        }
    }

    /// The cost of the guest's memory to the host less what the guest has in use (all that is not
    /// free), in KiB. The guest's kernel is in neither figure.
    pub fn excess(&self) -> Result<i64> {
        let meminfo = self.mconsole()?.proc("meminfo")?;
        let used = host::field(&meminfo, "MemTotal")? - host::field(&meminfo, "MemFree")?;
        Ok(self.memory()?.cost - used)
    }

    /// The guest's memory size, in KiB.
    pub fn size(&self) -> i64 {
        i64::from(self.size) << 10
    }

    pub fn pid(&self) -> i32 {
        self.uml.as_raw_pid()
    }

    pub fn mappings(&self) -> Result<usize> {
        Ok(host::mappings(self.pid())?.1)
    }

    pub fn user(&self) -> Result<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.uml))?;
        let line = status
            .lines()
            .find(|l| l.starts_with("Uid:"))
            .context("no Uid")?;
        Ok(line
            .split_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned())
    }

    /// Sends a signal to UML itself, bypassing devanon-run.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.uml, signal)?)
    }

    /// Sends a signal to devanon-run, which must forward it.
    pub fn kill_run(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.run), signal)?)
    }

    /// Checks that our guest kernel has not warned: it is not tainted, and lockdep, if there, is still enabled.
    pub fn check_kernel(&self) -> Result<()> {
        let console = self.mconsole()?;
        let tainted = console.proc("sys/kernel/tainted")?;
        ensure!(
            tainted.trim() == "0",
            "{}: its kernel is tainted: {tainted}",
            self.name
        );
        // Only kernels with lockdep have this file.
        if let Ok(stats) = console.ask("proc lockdep_stats")? {
            ensure!(
                host::field(&stats, " debug_locks")? == 1,
                "{}: lockdep has disabled itself after a report",
                self.name
            );
        }
        Ok(())
    }

    /// Shuts the guest down and waits for its end. Runs [`Guest::check_kernel`] first if the kernel is ours.
    pub fn power_off(&mut self) -> Result<()> {
        if !self.by_devanon_run {
            self.check_kernel()?;
        }
        self.say(match self.userland {
            Userland::Small => "poweroff",
            // There is no D-Bus: tell init directly, as a power switch would.
            Userland::Debian => "systemctl poweroff --force",
            Userland::Single => "exit",
        })?;
        self.expect("reboot: Power down")?;
        self.wait(POWERED_OFF)
    }

    /// Waits for the process we started to exit, and checks its exit status: 128 + N if signal N
    /// killed it.
    pub fn wait(&mut self, wanted: &[i32]) -> Result<()> {
        let end = Instant::now() + ANSWER_TIMEOUT;
        while Instant::now() < end {
            if let Some(status) = self.run.try_wait()? {
                let code = status.code().or(status.signal().map(|signal| 128 + signal));
                if !code.is_some_and(|code| wanted.contains(&code)) {
                    self.show_tail();
                    bail!("{}: {status}, expected {wanted:?}", self.name);
                }
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.show_tail();
        bail!("{} did not exit", self.name)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Ok(None) = self.run.try_wait() {
            let _ = self.kill(Signal::KILL);
            let _ = self.run.kill();
            let _ = self.run.wait();
        }
        let _ = fs::remove_file(format!("/var/{}.cow", self.name));
    }
}
