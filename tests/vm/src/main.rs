// SPDX-License-Identifier: GPL-2.0

//! Boots a kernel in QEMU, runs one command in it as the child of our PID 1 (devanon-init), and
//! judges how that went.
//!
//! The verdict comes over a virtio port of its own. The console is only ever read for signs of
//! trouble, never for success. The rules, strongest first:
//!
//! 1. A sign of kernel trouble on the console, or new taint other than out-of-tree and unsigned
//!    module, is kernel trouble (exit 3), whatever the command said and however the VM ended. So
//!    is a VM that went down in the middle without a word.
//! 2. The time limit, or no PID 1 within three minutes, is a timeout (4).
//! 3. A VM that ended before PID 1 spoke, a QEMU that failed, a detector of the kernel that gave
//!    up, or a verdict that is in doubt, is an infrastructure error (5).
//! 4. A status other than 0, a failed test, and KTAP that does not add up are failures (1).
//!
//! See [`Cli`] for the rest.

mod console;
mod initramfs;
mod kernel;
mod ktap;
mod qemu;

use std::ffi::OsString;
use std::fs;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::process::ExitStatus;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use clap::Parser;
use rustix::fs::FlockOperation;
use rustix::fs::flock;

use devanon_summary::Summary;

use crate::initramfs::Archive;
use crate::kernel::Kernel;
use crate::ktap::Ktap;
use crate::qemu::Machine;
use crate::qemu::TimedOut;

/// Programs for the VM, static.
const STATIC: &str = "build/bin";
/// What scripts/uml-guest makes.
const UML: &str = "build/uml/rootfs-extra";

/// How long a VM may take to reach PID 1, and a trial of KVM altogether. A kernel with every
/// detector on, emulated on a busy machine, takes its time.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
const KVM_LIMIT: Duration = Duration::from_secs(15);
/// How often the console is looked at, and how much longer a VM lives after a sign of trouble.
const LOOK: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::from_secs(5);

/// Boots a kernel in QEMU, runs COMMAND in it, and judges how that went.
///
/// What COMMAND prints goes to standard output as it comes, and must be KTAP unless --plain.
/// Progress and the verdict go to standard error. Runs in the project's top directory inside the
/// build root; everything of a run is kept in build/vm/NAME: summary.json, console.log, ktap.log
/// (all that came over the verdict port), qemu.log, qemu-command, initramfs.cpio.
#[derive(Parser)]
#[command(
    name = "devanon-vm",
    after_help = "\
Exit status:
  0  passed
  1  tests failed: COMMAND failed, a test failed, or its KTAP does not add up
  2  wrong usage
  3  kernel trouble: panic, oops, warning, lockdep, leak, hung task, RCU stall …, new taint other
     than O and E, or the VM went down in the middle; whatever the tests say
  4  timeout: --time-limit, or PID 1 not reached within three minutes
  5  infrastructure error: QEMU failed, something to boot is missing, the VM ended before PID 1,
     kmemleak or lockdep gave up, or COMMAND wrote a verdict of its own

A kernel with kmemleak is searched for leaks when COMMAND has ended.

In the VM: busybox in /bin, devanon-tests in /bin, devanon.ko in /lib/devanon (not loaded), zram,
virtio_blk and ext4 in /lib/modules, /tmp and /dev/shm of 8 MiB each, users root and user (1000). With --shell the module
is loaded; leave the shell to power off, Ctrl-A X ends QEMU."
)]
struct Cli {
    /// Kernel line, a directory of build/kernels
    #[arg(long)]
    line: String,

    /// Name of the run, a directory of build/vm
    #[arg(long, default_value = "run", value_parser = name)]
    name: String,

    /// Kills the VM after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    time_limit: u64,

    /// Memory of the VM
    #[arg(long, value_name = "MIB", default_value_t = 3072)]
    memory: u32,

    /// Processors of the VM
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,

    /// Emulates one processor whose nanoseconds are instructions: time in the VM counts them
    #[arg(long, conflicts_with = "cpus")]
    icount: bool,

    /// Puts a file into the VM (readable and executable for all); may be repeated
    #[arg(long = "file", value_name = "HOST=GUEST", value_parser = file_pair)]
    files: Vec<(PathBuf, String)>,

    /// Gives the VM a disk, /dev/vda and so on, with this raw image, and writes to it; may be repeated
    #[arg(long = "disk", value_name = "IMAGE")]
    disks: Vec<PathBuf>,

    /// Puts UML into the VM: the tree that scripts/uml-guest makes
    #[arg(long)]
    uml: bool,

    /// Further kernel parameters
    #[arg(long, value_name = "PARAMETERS", default_value = "")]
    append: String,

    /// COMMAND is no test: only its status counts
    #[arg(long)]
    plain: bool,

    /// Leaves out devanon.ko and devanon-tests
    #[arg(long)]
    bare: bool,

    /// An interactive shell with the module loaded, instead of COMMAND
    #[arg(long, conflicts_with = "command")]
    shell: bool,

    /// What to run in the VM
    #[arg(last = true, required_unless_present = "shell")]
    command: Vec<OsString>,
}

fn name(text: &str) -> Result<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    ensure!(
        text.chars().all(good) && text.starts_with(|c: char| c.is_ascii_alphanumeric()),
        "letters, digits, dots, dashes and underscores only"
    );
    Ok(text.to_owned())
}

fn file_pair(text: &str) -> Result<(PathBuf, String)> {
    let (host, guest) = text.split_once('=').context("not of the form HOST=GUEST")?;
    ensure!(
        guest.starts_with('/'),
        "the path in the VM must be absolute"
    );
    Ok((host.into(), guest.into()))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let start = Instant::now();
    let mut heard = Heard::default();
    let failed = |error| Verdict::new(Outcome::Infrastructure, format!("{error:#}"));
    let verdict = match start_over(&cli.name) {
        Ok((directory, _lock)) => {
            let verdict = run(&cli, &directory, &mut heard).unwrap_or_else(failed);
            let summary = summary(&cli, &verdict, &heard, start.elapsed());
            match summary.write(&directory.join("summary.json")) {
                Ok(()) => verdict,
                Err(error) => failed(error),
            }
        }
        Err(error) => failed(error),
    };

    for line in &verdict.details {
        eprintln!("  {line}");
    }
    let console = Path::new("build/vm").join(&cli.name).join("console.log");
    if console.exists() {
        eprintln!("devanon-vm: console: {}", console.display());
    }
    let mut line = format!("devanon-vm: {}: {}", cli.name, verdict.outcome.label());
    if !verdict.reason.is_empty() {
        line += &format!(": {}", verdict.reason);
    }
    let ktap = &heard.ktap;
    if heard.started && !cli.plain {
        line += &format!(
            ", {} passed, {} failed, {} skipped",
            ktap.passed, ktap.failed, ktap.skipped
        );
    }
    if let Some(leaks) = heard.leaks {
        line += &format!(", {leaks} leaks");
    }
    eprintln!("{line}, {:.1} s", start.elapsed().as_secs_f64());
    ExitCode::from(verdict.outcome.code())
}

#[derive(Clone, Copy)]
enum Outcome {
    Pass,
    Fail,
    Trouble,
    Timeout,
    Infrastructure,
}

impl Outcome {
    fn code(self) -> u8 {
        match self {
            Outcome::Pass => 0,
            Outcome::Fail => 1,
            Outcome::Trouble => 3,
            Outcome::Timeout => 4,
            Outcome::Infrastructure => 5,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Outcome::Pass => "PASS",
            Outcome::Fail => "FAIL",
            Outcome::Trouble => "KERNEL TROUBLE",
            Outcome::Timeout => "TIMEOUT",
            Outcome::Infrastructure => "INFRASTRUCTURE",
        }
    }
}

/// How a run went, for the last line, what to show above it, and what to say of it in the summary.
struct Verdict {
    outcome: Outcome,
    reason: String,
    details: Vec<String>,
    findings: Vec<String>,
}

impl Verdict {
    fn new(outcome: Outcome, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Verdict {
            outcome,
            findings: Vec::from_iter((!reason.is_empty()).then(|| reason.clone())),
            reason,
            details: Vec::new(),
        }
    }

    fn with(mut self, details: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.details.extend(details.into_iter().map(Into::into));
        self
    }
}

/// The run's directory, ours until the lock goes, without what the run before left there: nothing
/// of that may pass for this one's.
fn start_over(name: &str) -> Result<(PathBuf, File)> {
    ensure!(
        Path::new("build/kernels").is_dir(),
        "no build/kernels here: run in the project's top directory, after make has built the kernels"
    );
    let directory = Path::new("build/vm").join(name);
    fs::create_dir_all(&directory)?;
    let lock = File::create(directory.join("lock"))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("a run named {name} is going on"))?;
    for file in [
        "summary.json",
        "console.log",
        "ktap.log",
        "qemu.log",
        "qemu-command",
    ] {
        let _ = fs::remove_file(directory.join(file));
    }
    Ok((directory, lock))
}

fn summary(cli: &Cli, verdict: &Verdict, heard: &Heard, time: Duration) -> Summary {
    let ktap = &heard.ktap;
    let mut findings = verdict.findings.clone();
    for problem in heard.problems(cli) {
        if !findings.contains(problem) {
            findings.push(problem.clone());
        }
    }
    Summary {
        name: cli.name.clone(),
        kernel: Kernel::of_line(&cli.line).ok().map(|kernel| kernel.release),
        passed: ktap.passed,
        failed: ktap.failed,
        skipped: ktap.skipped,
        operations: ktap.operations,
        pages: ktap.pages,
        faults_injected: ktap.faults,
        seconds: devanon_summary::tenths(time.as_secs_f64()),
        findings,
    }
}

fn run(cli: &Cli, directory: &Path, heard: &mut Heard) -> Result<Verdict> {
    let kernel = Kernel::of_line(&cli.line)?;
    let mut machine = Machine {
        image: kernel.image(directory)?,
        kvm: false,
        icount: cli.icount,
        memory: cli.memory,
        cpus: if cli.icount { 1 } else { cli.cpus },
        append: cli.append.clone(),
        disks: cli.disks.clone(),
        directory: directory.to_owned(),
    };
    machine.kvm = !cli.icount && qemu::kvm_works(Path::new("build/vm/kvm"), || try_kvm(&machine))?;
    build_initramfs(cli, &kernel, &machine.initramfs())?;
    eprintln!(
        "devanon-vm: {}: {} on {} processors, {} MiB, {}",
        cli.name,
        kernel.release,
        machine.cpus,
        cli.memory,
        match (machine.kvm, machine.icount) {
            (true, _) => "KVM",
            (false, false) => "TCG (emulation)",
            (false, true) => "TCG (emulation), instructions counted",
        }
    );

    if cli.shell {
        // Here a person reads the console: warnings, and no more.
        machine.append += " loglevel=5";
        let status = machine.interact()?;
        return judge(cli, &machine, heard, Some(status));
    }
    let limit = Duration::from_secs(cli.time_limit);
    let status = listen(&machine, &cli.command, limit, heard, true)?;
    heard.ktap.end();
    judge(cli, &machine, heard, status)
}

fn build_initramfs(cli: &Cli, kernel: &Kernel, path: &Path) -> Result<()> {
    let mut archive = Archive::create(path)?;
    archive.base(&Path::new(STATIC).join("devanon-init"))?;
    archive.modules(&kernel.directory.join("modules"), &kernel.release)?;
    if !cli.bare {
        let module = kernel.directory.join("module/devanon.ko");
        archive.file(&module, "/lib/devanon/devanon.ko")?;
        archive.file(
            &Path::new(STATIC).join("devanon-tests"),
            "/bin/devanon-tests",
        )?;
    }
    if cli.uml {
        archive.tree(Path::new(UML), Path::new("/"))?;
    }
    for (host, guest) in &cli.files {
        archive.file(host, guest)?;
    }
    archive.finish()
}

/// Boots the same kernel with KVM, as far as PID 1 and back.
fn try_kvm(machine: &Machine) -> Result<bool> {
    eprintln!("devanon-vm: trying whether KVM works here");
    let directory = machine.directory.join("kvm");
    fs::create_dir_all(&directory)?;
    let trial = Machine {
        image: machine.image.clone(),
        kvm: true,
        icount: false,
        memory: 512,
        cpus: machine.cpus,
        append: String::new(),
        disks: Vec::new(),
        directory,
    };
    let mut archive = Archive::create(&trial.initramfs())?;
    archive.base(&Path::new(STATIC).join("devanon-init"))?;
    archive.finish()?;
    let mut heard = Heard::default();
    listen(&trial, &["true"], KVM_LIMIT, &mut heard, false)?;
    Ok(heard.status == Some(0))
}

/// What came over the verdict port.
#[derive(Default)]
struct Heard {
    started: bool,
    status: Option<u8>,
    leaks: Option<u64>,
    taint: Option<(u64, u64)>,
    error: Option<String>,
    timed_out: bool,
    ktap: Ktap,
}

/// Runs the VM to its end or the limit. `aloud` passes on what the command prints.
fn listen<S: AsRef<std::ffi::OsStr>>(
    machine: &Machine,
    words: &[S],
    limit: Duration,
    heard: &mut Heard,
    aloud: bool,
) -> Result<Option<ExitStatus>> {
    const STDOUT: &str = "cannot write to standard output";
    let mut log = File::create(machine.directory.join("ktap.log"))?;
    let mut vm = machine.start(words)?;
    let mut blank = false;
    let mut look = vm.start + LOOK;
    let mut grace = None;
    loop {
        let now = Instant::now();
        if now >= look {
            look = now + LOOK;
            if grace.is_none()
                && !console::troubles(&console::lines(&machine.console_text())).is_empty()
            {
                grace = Some(now + GRACE);
            }
        }
        let limit = if heard.started {
            limit
        } else {
            limit.min(BOOT_LIMIT)
        };
        let deadline = grace.unwrap_or(vm.start + limit).min(vm.start + limit);
        let line = match vm.line(deadline.min(look)) {
            Ok(Some(line)) => line,
            Ok(None) => return vm.finish(),
            Err(TimedOut) if Instant::now() < deadline => continue,
            Err(TimedOut) => {
                heard.timed_out = true;
                return Ok(None);
            }
        };
        log.write_all(&line)?;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        if let Some(word) = text.strip_prefix("devanon-init: ") {
            if !heard.started && aloud {
                let seconds = vm.start.elapsed().as_secs_f64();
                eprintln!("devanon-vm: PID 1 after {seconds:.1} s");
            }
            heard.word(word);
            if heard.taint.is_some() || heard.error.is_some() {
                vm.acknowledge();
            }
            blank = false;
        } else if heard.status.is_some() {
            heard.out_of_place(text);
        } else if aloud {
            heard.ktap.line(text);
            let mut out = std::io::stdout();
            // PID 1 puts an empty line before its verdict, so this one may not be the command's.
            if std::mem::replace(&mut blank, text.is_empty()) {
                writeln!(out).context(STDOUT)?;
            }
            if !blank {
                out.write_all(&line).context(STDOUT)?;
            }
        }
    }
}

impl Heard {
    /// Takes one line of PID 1's own, see devanon-init. The command can write such lines, too: one
    /// that is not due is an error, and so is anything after the verdict.
    fn word(&mut self, text: &str) {
        let words: Vec<&str> = text.split(' ').collect();
        let hex = |word| u64::from_str_radix(word, 16).ok();
        let due = match (words.as_slice(), self.started, self.status, self.taint) {
            (["started"], false, ..) => {
                self.started = true;
                true
            }
            (["status", status], true, None, None) => {
                self.status = status.parse().ok();
                self.status.is_some()
            }
            (["leaks", leaks], true, Some(_), None) if self.leaks.is_none() => {
                self.leaks = leaks.parse().ok();
                self.leaks.is_some()
            }
            (["taint", before, after], true, Some(_), None) => {
                self.taint = hex(before).zip(hex(after));
                self.taint.is_some()
            }
            (["error", ..], true, None, None) => {
                self.error = Some(text["error ".len()..].to_owned());
                true
            }
            _ => false,
        };
        if !due {
            self.out_of_place(text);
        }
    }

    /// What the command's KTAP leaves to be desired.
    fn problems(&self, cli: &Cli) -> &[String] {
        if cli.plain || !self.started {
            return &[];
        }
        &self.ktap.problems
    }

    fn out_of_place(&mut self, text: &str) {
        self.error
            .get_or_insert_with(|| format!("its verdict is in doubt, by this line: {text}"));
    }
}

/// The rules: see the top of this file.
fn judge(cli: &Cli, machine: &Machine, heard: &Heard, qemu: Option<ExitStatus>) -> Result<Verdict> {
    const TAIL: usize = 30;
    let log = machine.console_text();
    let lines = console::lines(&log);
    let tail = || console::tail(&lines, TAIL).iter().copied();

    let trouble = console::troubles(&lines);
    if let Some(&first) = trouble.first() {
        let says = |&&n: &&usize| !lines[n].contains(console::CUT);
        let main = *trouble.iter().find(says).unwrap_or(&first);
        let reason = format!("line {} of the console: {}", main + 1, lines[main].trim());
        let mut verdict = Verdict::new(Outcome::Trouble, reason);
        let more = trouble.iter().filter(|n| says(n) && **n != main);
        let more = more.take(TAIL).map(|&n| lines[n].trim().to_owned());
        verdict.findings.extend(more);
        // The report that goes with the first sign, then only the other signs' own lines.
        let end = lines.len().min(first + TAIL);
        let others = trouble.iter().filter(|&&n| n >= end);
        let shown = (first..end).chain(others.copied().take(TAIL));
        return Ok(verdict.with(shown.map(|n| format!("{}: {}", n + 1, lines[n]))));
    }
    let taint = heard.taint.map_or(String::new(), |(before, after)| {
        console::new_taint(before, after)
    });
    if !taint.is_empty() {
        let reason = format!("the kernel is newly tainted: {taint}");
        return Ok(Verdict::new(Outcome::Trouble, reason).with(tail()));
    }
    if cli.shell {
        return Ok(match qemu {
            Some(status) if status.success() => Verdict::new(Outcome::Pass, ""),
            _ => Verdict::new(Outcome::Infrastructure, "QEMU failed"),
        });
    }

    if !heard.started {
        let verdict = match qemu {
            None => Verdict::new(Outcome::Timeout, "PID 1 was not reached"),
            Some(status) => {
                let reason = format!("the VM ended before PID 1 spoke; QEMU: {status}");
                let said = fs::read_to_string(machine.qemu_log()).unwrap_or_default();
                Verdict::new(Outcome::Infrastructure, reason).with(said.lines())
            }
        };
        return Ok(verdict.with(["the console's last lines:"]).with(tail()));
    }
    if heard.timed_out {
        let reason = format!("killed after {} s", cli.time_limit);
        return Ok(Verdict::new(Outcome::Timeout, reason).with(tail()));
    }
    if let Some(error) = &heard.error {
        let reason = format!("PID 1: {error}");
        return Ok(Verdict::new(Outcome::Infrastructure, reason).with(heard.problems(cli)));
    }
    let (Some(status), Some(_)) = (heard.status, heard.taint) else {
        let (outcome, what) = match qemu {
            Some(status) if status.success() => {
                (Outcome::Trouble, "the VM went down without a word")
            }
            _ => (Outcome::Infrastructure, "QEMU died"),
        };
        return Ok(Verdict::new(outcome, what).with(tail()));
    };
    if qemu.is_none() {
        return Ok(Verdict::new(Outcome::Timeout, "the VM did not power off").with(tail()));
    }

    let problems = heard.problems(cli);
    Ok(if status != 0 {
        let reason = format!("the command ended with status {status}");
        let mut verdict = Verdict::new(Outcome::Fail, reason).with(problems);
        // That is only how it says so.
        if !problems.is_empty() {
            verdict.findings.clear();
        }
        verdict
    } else if let Some(problem) = problems.first() {
        Verdict::new(Outcome::Fail, problem).with(problems)
    } else {
        Verdict::new(Outcome::Pass, "")
    })
}
