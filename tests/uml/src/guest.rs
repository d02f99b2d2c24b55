// SPDX-License-Identifier: GPL-2.0

//! One UML guest, run as an unprivileged user.

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
pub const UML: &str = "/bin/linux.uml";
/// Ours: linux-source with patches/uml.
pub const OURS: &str = "/bin/linux";
pub const RUN: &str = "/bin/devanon-run";
pub const USER: u32 = 1000;
/// What a guest believes to have, in MiB, if nothing else is said.
pub const SIZE: u32 = 192;

const FILES: &str = "/lib/devanon";
/// Debian's userland, only in VMs that are given it.
pub const IMAGE: &str = "/lib/devanon/debian.img";
/// Longer than any guest needs for one answer on a slow machine with a debug kernel.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longer than any program of a guest runs beside other guests and their programs.
const ENDURANCE: Duration = Duration::from_secs(1200);
/// What UML ends with when it is powered off. On any kind of memory it now and then aborts after its
/// last word, when its processes are gone already.
pub const POWERED_OFF: &[i32] = &[0, 128 + 6];

/// What runs in a guest.
#[derive(Clone, Copy, PartialEq)]
pub enum Userland {
    /// tests/guest/init on busybox, in memory.
    Small,
    /// Debian with systemd, on a copy-on-write disk.
    Debian,
    /// That disk, and no more than a shell: tests/guest/single.
    Single,
}

impl Userland {
    fn has_disk(self) -> bool {
        self != Self::Small
    }
}

/// A guest to be.
pub struct Setup {
    name: String,
    program: Vec<String>,
    userland: Userland,
    size: u32,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    /// Runs in the child before it becomes UML.
    prepare: Option<fn() -> io::Result<()>>,
    /// Its two ends, ours first.
    terminal: Option<(File, OwnedFd)>,
}

impl Setup {
    /// Debian's UML on /dev/anon, by devanon-run.
    pub fn unmodified(number: usize) -> Self {
        Self::new(number, &[RUN, UML])
    }

    /// Our own UML.
    pub fn ours(number: usize) -> Self {
        Self::new(number, &[OURS])
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

    /// Further words for UML's command line.
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

    /// A terminal as console: our end of it, and the guest's.
    pub fn terminal(mut self, ours: File, theirs: OwnedFd) -> Self {
        self.terminal = Some((ours, theirs));
        self
    }

    /// The program, and what it is given by those who made this.
    pub fn words(&self) -> String {
        [&self.program[..], &self.arguments[..]].concat().join(" ")
    }

    fn home(&self) -> PathBuf {
        PathBuf::from(format!("/tmp/{}", self.name))
    }

    fn command(&mut self) -> Result<Command> {
        let home = self.home();
        fs::create_dir_all(&home)?;
        chown(&home, Some(USER), Some(USER))?;
        // Its processes take turns. On one CPU they do so without an interrupt from one CPU to
        // another each time, which takes long where the CPUs are emulated.
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
            .arg(format!("uml_dir={}", home.display()))
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
                // Where the host is slow, so are the console, without which there is no login prompt, and
                // services.
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
            .env("HOME", &home)
            .envs(self.environment.iter().cloned())
            .uid(USER)
            .gid(USER);
        if let Some(prepare) = self.prepare {
            // SAFETY: what there is to prepare is only system calls on the child itself.
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

    /// Runs UML to its end, which is to be soon: its exit status and what it said on stderr.
    pub fn fails(mut self) -> Result<(i32, String)> {
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
        // Until devanon-run has started UML, it stands for it.
        let uml = Pid::from_child(&run);
        Ok(Guest {
            directory: self.home().join(&self.name),
            by_run: self.program[0] == RUN,
            name: self.name,
            userland: self.userland,
            size: self.size,
            run,
            uml,
            keyboard,
            console,
            said: String::new(),
            read: 0,
            begun: Instant::now(),
        })
    }
}

pub struct Guest {
    pub name: String,
    /// Where its management console is.
    directory: PathBuf,
    by_run: bool,
    userland: Userland,
    size: u32,
    run: Child,
    /// The process of UML itself: a child of devanon-run, or the one we started.
    uml: Pid,
    keyboard: File,
    console: Receiver<Vec<u8>>,
    /// All that the console said, and how much of it has been looked at.
    said: String,
    read: usize,
    /// When its last program was begun.
    begun: Instant,
}

impl Guest {
    /// Waits until `find` finds what it looks for in what the console said and nobody looked at
    /// yet: where that ends, and what it is.
    fn wait_for<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<(usize, T)>) -> Result<T> {
        let end = Instant::now() + PATIENCE;
        let why = loop {
            if let Some((size, found)) = find(&self.said[self.read..]) {
                self.read += size;
                return Ok(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.console.recv_timeout(left) {
                Ok(chunk) => self.said += &String::from_utf8_lossy(&chunk),
                Err(RecvTimeoutError::Timeout) => {
                    host::show_threads(self.pid());
                    break "in time";
                }
                Err(RecvTimeoutError::Disconnected) => break "before its console closed",
            }
        };
        self.show_tail();
        bail!("{} did not say \"{what}\" {why}", self.name)
    }

    /// The rest of the guest's next line that begins so.
    pub fn expect(&mut self, begin: &str) -> Result<String> {
        self.wait_for(begin, |text| {
            let mut at = 0;
            for line in text.split_inclusive('\n') {
                at += line.len();
                let rest = line.trim_start_matches('\r').strip_prefix(begin);
                if let Some(rest) = rest.filter(|_| line.ends_with('\n')) {
                    return Some((at, rest.trim().to_owned()));
                }
            }
            None
        })
    }

    /// Waits for this text, wherever in a line.
    fn expect_text(&mut self, wanted: &str) -> Result<()> {
        self.wait_for(wanted, |text| {
            text.find(wanted).map(|at| (at + wanted.len(), ()))
        })
    }

    /// What the guest said last, for the one who has to find out.
    fn show_tail(&mut self) {
        for chunk in self.console.try_iter() {
            self.said += &String::from_utf8_lossy(&chunk);
        }
        let lines: Vec<&str> = self.said.lines().collect();
        for line in &lines[lines.len().saturating_sub(30)..] {
            eprintln!("{}: {line}", self.name);
        }
    }

    /// Waits for the guest's user space: of Debian's, for a login prompt.
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
        if self.by_run {
            let children = host::children(Pid::from_child(&self.run).as_raw_pid())?;
            let child = children.first().context("devanon-run has no child")?;
            self.uml = Pid::from_raw(*child).context("no process 0")?;
        }
        Ok(())
    }

    /// Logs in to Debian if need be, to a shell that says nothing of its own.
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

    /// Has Debian's userland do a piece of work (`work` of tests/guest), which must go well.
    pub fn work(&mut self, words: &str) -> Result<()> {
        self.run("work", words)
    }

    /// The same of `work` or `disk`.
    pub fn run(&mut self, program: &str, words: &str) -> Result<()> {
        self.begin(program, words)?;
        self.finish(program, words)
    }

    /// The lines that a shell command of Debian's userland says.
    pub fn lines(&mut self, command: &str) -> Result<Vec<String>> {
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

    /// Waits for the end of what was begun.
    pub fn finish(&mut self, program: &str, words: &str) -> Result<()> {
        while !self.is_done(program, words)? {
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Leaves the guest at what `work` or `disk` does (see tests/guest): see [`Guest::is_done`].
    pub fn begin(&mut self, program: &str, words: &str) -> Result<()> {
        let word = words.split(' ').next().unwrap_or_default();
        self.begun = Instant::now();
        // If it is killed it says nothing itself. What it did say comes first, and counts.
        self.say(&format!(
            "{program} {words} || echo \"{program}: {word} ended with $?\""
        ))
    }

    fn end(&mut self, program: &str, words: &str) -> Result<()> {
        let word = words.split(' ').next().unwrap_or_default();
        let answer = self.expect(&format!("{program}: {word} "))?;
        if !answer.starts_with("ok") {
            self.show_tail();
            bail!("{}: {program} {words}: {answer}", self.name);
        }
        eprintln!("{}: {program} {words}: {answer}", self.name);
        Ok(())
    }

    /// Whether the program has come to its end, which must be a good one, and within [`ENDURANCE`].
    pub fn is_done(&mut self, program: &str, words: &str) -> Result<bool> {
        for chunk in self.console.try_iter() {
            self.said += &String::from_utf8_lossy(&chunk);
        }
        let begin = format!("{program}: ");
        let unread = &self.said[self.read..];
        let done = unread.starts_with(&begin) || unread.contains(&format!("\n{begin}"));
        if done {
            self.end(program, words)?;
        } else if self.begun.elapsed() > ENDURANCE {
            host::show_threads(self.pid());
            self.show_tail();
            bail!("{}: {program} {words} has not ended in time", self.name);
        }
        Ok(done)
    }

    /// The rest of the last whole line that begins so, when the guest has ended.
    pub fn last(&mut self, begin: &str) -> Result<String> {
        loop {
            match self.console.recv_timeout(PATIENCE) {
                Ok(chunk) => self.said += &String::from_utf8_lossy(&chunk),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!("{}: its console is still open", self.name),
            }
        }
        let lines = self.said.split_inclusive('\n').rev();
        let mut found = lines.filter_map(|line| line.strip_suffix('\n')?.strip_prefix(begin));
        let rest = found
            .next()
            .with_context(|| format!("no line \"{begin}\""))?;
        Ok(rest.trim().to_owned())
    }

    /// The copy-on-write file of a Debian guest, which goes when `self` does.
    pub fn cow(&self) -> String {
        format!("/var/{}.cow", self.name)
    }

    /// Waits for a verdict on the workload: every file the machine that built it knew is right.
    pub fn wait_workload(&mut self) -> Result<()> {
        let files = fs::read_to_string(format!("{FILES}/workload.sha256"))?
            .lines()
            .count();
        let answer = self.expect("guest: workload")?;
        if answer != format!("ok {files} files") {
            bail!("{}: workload: {answer}, wanted {files} files", self.name);
        }
        Ok(())
    }

    pub fn say(&self, word: &str) -> Result<()> {
        writeln!(&self.keyboard, "{word}").with_context(|| format!("{}: console", self.name))
    }

    pub fn memory(&self) -> Result<MemoryFile> {
        memory_file(self.uml.as_raw_pid())?
            .with_context(|| format!("{} has no memory file", self.name))
    }

    pub fn mconsole(&self) -> Result<Console> {
        Console::open(&self.directory)
    }

    /// The lines of the guest's kernel log that have this word.
    pub fn log(&mut self, word: &str) -> Result<Vec<String>> {
        self.say(&format!("log {word}"))?;
        let mut lines = Vec::new();
        loop {
            let line = self.expect("guest: log")?;
            if line == "end" {
                return Ok(lines);
            }
            lines.push(line);
        }
    }

    /// What the guest's memory costs the host beyond what the guest has in use (all that is not
    /// free), in KiB. Its kernel is not part of either.
    pub fn excess(&self) -> Result<i64> {
        let meminfo = self.mconsole()?.proc("meminfo")?;
        let used = host::field(&meminfo, "MemTotal")? - host::field(&meminfo, "MemFree")?;
        Ok(self.memory()?.cost - used)
    }

    /// In KiB.
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

    /// Sends a signal to UML itself, past devanon-run.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.uml, signal)?)
    }

    /// Sends a signal to devanon-run, which is to pass it on.
    pub fn kill_run(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.run), signal)?)
    }

    /// Our kernel has warned of nothing yet. One that checks its locks does so until it finds something.
    pub fn content(&self) -> Result<()> {
        let console = self.mconsole()?;
        let tainted = console.proc("sys/kernel/tainted")?;
        ensure!(
            tainted.trim() == "0",
            "{}: its kernel is tainted: {tainted}",
            self.name
        );
        // Others do not have this file.
        if let Ok(stats) = console.ask("proc lockdep_stats")? {
            ensure!(
                host::field(&stats, " debug_locks")? == 1,
                "{}: its kernel has found fault with its locks",
                self.name
            );
        }
        Ok(())
    }

    /// Has the guest shut down, and waits for its end. Its kernel, if it is ours, is [`Guest::content`] until then.
    pub fn power_off(&mut self) -> Result<()> {
        if !self.by_run {
            self.content()?;
        }
        self.say(match self.userland {
            Userland::Small => "poweroff",
            // Debian without D-Bus: as init would be told by a power switch.
            Userland::Debian => "systemctl poweroff --force",
            Userland::Single => "exit",
        })?;
        self.expect("reboot: Power down")?;
        self.wait(POWERED_OFF)
    }

    /// Waits for the end of what was started, and checks its exit status: 128 + N if signal N
    /// killed it.
    pub fn wait(&mut self, wanted: &[i32]) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.run.try_wait()? {
                let code = status.code().or(status.signal().map(|signal| 128 + signal));
                if !code.is_some_and(|code| wanted.contains(&code)) {
                    self.show_tail();
                    bail!("{}: {status}, wanted {wanted:?}", self.name);
                }
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.show_tail();
        bail!("{} did not end", self.name)
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
