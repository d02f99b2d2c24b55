// SPDX-License-Identifier: GPL-2.0

//! One UML guest, run by devanon-run as an unprivileged user.

use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
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
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;

use crate::host::Anon;
use crate::host::memory_file;

pub const UML: &str = "/bin/linux.uml";
pub const RUN: &str = "/bin/devanon-run";
pub const USER: u32 = 1000;
/// What the guest believes to have, in MiB.
pub const SIZE: u32 = 192;

const FILES: &str = "/lib/devanon";
/// Longer than any guest needs for one answer on a slow machine with a debug kernel.
const PATIENCE: Duration = Duration::from_secs(600);
/// What UML ends with when it is powered off. On any kind of memory it now and then aborts after its
/// last word, when its processes are gone already.
const POWERED_OFF: &[i32] = &[0, 128 + 6];

pub struct Guest {
    pub name: String,
    run: Child,
    /// The process of UML itself, a child of devanon-run.
    uml: Pid,
    console: Receiver<String>,
    /// The console's last lines, for when something goes wrong.
    tail: Vec<String>,
}

impl Guest {
    pub fn start(number: usize, arguments: &[&str]) -> Result<Self> {
        let name = format!("g{number}");
        // Its processes take turns. On one CPU they do so without an interrupt from one CPU to
        // another each time, which takes long where the CPUs are emulated.
        let cpu = number % thread::available_parallelism()?;
        let home = format!("/tmp/{name}");
        fs::create_dir_all(&home)?;
        chown(&home, Some(USER), Some(USER))?;
        let mut run = Command::new("taskset")
            .args([&format!("{:x}", 1 << cpu), RUN, UML])
            .args([
                &format!("mem={SIZE}M"),
                &format!("initrd={FILES}/guest.cpio"),
            ])
            .args([&format!("umid={name}"), &format!("uml_dir={home}")])
            .args(["con=null", "con0=fd:0,fd:1", "quiet", "loglevel=4"])
            .args(arguments)
            .env("HOME", &home)
            .uid(USER)
            .gid(USER)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context(RUN)?;
        let stdout = run.stdout.take().context("no console")?;
        let (lines, console) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        // Until UML is found, devanon-run stands for it.
        let uml = Pid::from_child(&run);
        Ok(Self {
            name,
            run,
            uml,
            console,
            tail: Vec::new(),
        })
    }

    /// The rest of the guest's next line that begins so.
    fn expect(&mut self, begin: &str) -> Result<String> {
        let end = Instant::now() + PATIENCE;
        let why = loop {
            match self
                .console
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(line) => {
                    let found = line.strip_prefix(begin);
                    let found = found.map(|rest| rest.trim().to_owned());
                    self.tail.push(line);
                    if let Some(rest) = found {
                        return Ok(rest);
                    }
                }
                Err(RecvTimeoutError::Timeout) => break "in time",
                Err(RecvTimeoutError::Disconnected) => break "before its console closed",
            }
        };
        self.show_tail();
        bail!("{} did not say \"{begin}\" {why}", self.name)
    }

    /// What the guest said last, for the one who has to find out.
    fn show_tail(&mut self) {
        self.tail.extend(self.console.try_iter());
        let from = self.tail.len().saturating_sub(30);
        for line in &self.tail[from..] {
            eprintln!("{}: {line}", self.name);
        }
    }

    /// Waits for the guest's user space.
    pub fn wait_up(&mut self) -> Result<()> {
        self.expect("guest: up")?;
        let run = self.run.id();
        let children = fs::read_to_string(format!("/proc/{run}/task/{run}/children"))?;
        let child = children
            .split_whitespace()
            .next()
            .context("devanon-run has no child")?;
        self.uml = Pid::from_raw(child.parse()?).context("no process 0")?;
        Ok(())
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
        let mut stdin = self.run.stdin.as_ref().context("no console")?;
        writeln!(stdin, "{word}").with_context(|| format!("{}: console", self.name))
    }

    pub fn memory(&self) -> Result<Anon> {
        memory_file(self.uml.as_raw_pid())?
            .with_context(|| format!("{} has no file of /dev/anon", self.name))
    }

    pub fn mappings(&self) -> Result<usize> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.uml))?;
        Ok(maps
            .lines()
            .filter(|line| line.ends_with("/dev/anon (deleted)"))
            .count())
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

    /// Has the guest shut down, and waits for its end.
    pub fn power_off(&mut self) -> Result<()> {
        self.say("poweroff")?;
        self.expect("reboot: Power down")?;
        self.wait(POWERED_OFF)
    }

    /// Waits for the end of devanon-run, and checks its exit status.
    pub fn wait(&mut self, wanted: &[i32]) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.run.try_wait()? {
                if !status.code().is_some_and(|code| wanted.contains(&code)) {
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
    }
}
