// SPDX-License-Identifier: GPL-2.0

//! Boots a kernel in QEMU, runs one command in it as a child of our PID 1 (devanon-init), and
//! judges the run.
//!
//! The verdict arrives over a virtio port of its own. The console is only searched for signs of
//! trouble, never for signs of success. The rules, strongest first:
//!
//! 1. A sign of kernel trouble on the console, or new taint other than "out-of-tree" and "unsigned
//!    module", is kernel trouble (exit 3), whatever the command reports and however the VM ends. A
//!    VM that goes down before the verdict is kernel trouble, too.
//! 2. The time limit, or no PID 1 within three minutes, is a timeout (4).
//! 3. A VM that ends before PID 1 reports, a QEMU that fails, a kernel detector that turned itself
//!    off, or a verdict that may be forged is an infrastructure error (5).
//! 4. A status other than 0, a failed test, and inconsistent KTAP are failures (1).
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

/// Statically linked programs for the VM.
const STATIC: &str = "build/bin";
/// The tree that scripts/uml-guest makes.
const UML: &str = "build/uml/rootfs-extra";

/// How long a VM may take to reach PID 1. A kernel with every detector, emulated on a busy machine,
/// is slow.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long a trial boot with KVM may take.
const KVM_LIMIT: Duration = Duration::from_secs(15);
/// How often the console is searched for signs of trouble.
const CONSOLE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a VM may go on after a sign of trouble.
const TROUBLE_GRACE: Duration = Duration::from_secs(5);

/// Boots a kernel in QEMU, runs COMMAND in it, and judges the run.
///
/// The output of COMMAND goes to standard output as it arrives, and must be KTAP unless --plain is
/// given. Progress and the verdict go to standard error. devanon-vm runs in the project's top
/// directory inside the build root, and keeps all files of a run in build/vm/NAME: summary.json,
/// console.log, ktap.log (everything from the verdict port), qemu.log, qemu-command, initramfs.cpio.
#[derive(Parser)]
#[command(
    name = "devanon-vm",
    after_help = "\
Exit status:
  0  passed
  1  tests failed: COMMAND failed, a test failed, or its KTAP is inconsistent
  2  wrong usage
  3  kernel trouble, whatever the tests report: panic, oops, warning, lockdep, leak, hung task,
     RCU stall …, new taint other than O and E, or the VM went down before the verdict
  4  timeout: --time-limit, or PID 1 not reached within three minutes
  5  infrastructure error: QEMU failed, something to boot is missing, the VM ended before PID 1,
     kmemleak or lockdep turned itself off, or COMMAND wrote a verdict of its own

On a kernel with kmemleak, PID 1 looks for leaks after COMMAND ends.

In the VM: busybox in /bin, devanon-tests in /bin, devanon.ko in /lib/devanon (not loaded), zram,
virtio_blk, loop and ext4 in /lib/modules, /tmp and /dev/shm of 8 MiB each, users root and user
(1000). With --shell the module is loaded; exit the shell to power off; Ctrl-A X ends QEMU."
)]
struct Cli {
    /// Which kernel to boot: a directory in build/kernels
    #[arg(long)]
    line: String,

    /// Name of the run, and of its directory in build/vm
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

    /// Emulates one processor at one instruction per nanosecond: time in the VM counts instructions
    #[arg(long, conflicts_with = "cpus")]
    icount: bool,

    /// Copies a file into the VM (readable and executable by everyone); may be repeated
    #[arg(long = "file", value_name = "HOST=GUEST", value_parser = file_pair)]
    files: Vec<(PathBuf, String)>,

    /// Gives the VM a writable disk, /dev/vda and so on, with this raw image; may be repeated
    #[arg(long = "disk", value_name = "IMAGE")]
    disks: Vec<PathBuf>,

    /// Copies UML into the VM: the tree that scripts/uml-guest makes
    #[arg(long)]
    uml: bool,

    /// Additional kernel parameters
    #[arg(long, value_name = "PARAMETERS", default_value = "")]
    append: String,

    /// COMMAND does not print KTAP: only its exit status counts
    #[arg(long)]
    plain: bool,

    /// Omits devanon.ko and devanon-tests
    #[arg(long)]
    bare: bool,

    /// Starts an interactive shell with the module loaded, instead of COMMAND
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
    let mut received = Received::default();
    let failed = |error| Verdict::new(Outcome::Infrastructure, format!("{error:#}"));
    let verdict = match run_directory(&cli.name) {
        Ok((directory, _lock)) => {
            let verdict = run(&cli, &directory, &mut received).unwrap_or_else(failed);
            let summary = summary(&cli, &verdict, &received, start.elapsed());
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
    let ktap = &received.ktap;
    if received.started && !cli.plain {
        line += &format!(
            ", {} passed, {} failed, {} skipped",
            ktap.passed, ktap.failed, ktap.skipped
        );
    }
    if let Some(leaks) = received.leaks {
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

/// The judgement of a run.
struct Verdict {
    outcome: Outcome,
    /// For the last line.
    reason: String,
    /// Shown above the last line.
    details: Vec<String>,
    /// For the summary.
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

/// Returns the run's directory, locked until the file is closed. Removes the previous run's results,
/// so that they cannot be taken for this run's.
fn run_directory(name: &str) -> Result<(PathBuf, File)> {
    ensure!(
        Path::new("build/kernels").is_dir(),
        "no build/kernels here: run this in the project's top directory, after make has built the kernels"
    );
    let directory = Path::new("build/vm").join(name);
    fs::create_dir_all(&directory)?;
    let lock = File::create(directory.join("lock"))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("another run named {name} is in progress"))?;
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

fn summary(cli: &Cli, verdict: &Verdict, received: &Received, time: Duration) -> Summary {
    let ktap = &received.ktap;
    let mut findings = verdict.findings.clone();
    for problem in received.problems(cli) {
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

fn run(cli: &Cli, directory: &Path, received: &mut Received) -> Result<Verdict> {
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
        // A person reads this console: nothing below warnings.
        machine.append += " loglevel=5";
        let status = machine.interact()?;
        return judge(cli, &machine, received, Some(status));
    }
    let limit = Duration::from_secs(cli.time_limit);
    let status = run_vm(&machine, &cli.command, limit, received, true)?;
    received.ktap.end();
    judge(cli, &machine, received, status)
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

/// Boots the same kernel with KVM, and runs `true` in it.
fn try_kvm(machine: &Machine) -> Result<bool> {
    eprintln!("devanon-vm: checking whether KVM works here");
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
    let mut received = Received::default();
    run_vm(&trial, &["true"], KVM_LIMIT, &mut received, false)?;
    Ok(received.status == Some(0))
}

/// What arrived over the verdict port.
#[derive(Default)]
struct Received {
    started: bool,
    status: Option<u8>,
    leaks: Option<u64>,
    taint: Option<(u64, u64)>,
    error: Option<String>,
    timed_out: bool,
    ktap: Ktap,
}

/// Runs the VM until it ends or the limit is reached. Returns QEMU's exit status, if it exited. With
/// `echo`, the command's output is printed and parsed as KTAP.
fn run_vm<S: AsRef<std::ffi::OsStr>>(
    machine: &Machine,
    words: &[S],
    limit: Duration,
    received: &mut Received,
    echo: bool,
) -> Result<Option<ExitStatus>> {
    const STDOUT: &str = "cannot write to standard output";
    let mut log = File::create(machine.directory.join("ktap.log"))?;
    let mut vm = machine.start(words)?;
    // An empty line is held back until the next line shows that it is the command's.
    let mut blank_held = false;
    let mut next_check = vm.start + CONSOLE_INTERVAL;
    let mut trouble_deadline = None;
    loop {
        let now = Instant::now();
        if now >= next_check {
            next_check = now + CONSOLE_INTERVAL;
            if trouble_deadline.is_none()
                && !console::trouble_lines(&console::lines(&machine.console_text())).is_empty()
            {
                trouble_deadline = Some(now + TROUBLE_GRACE);
            }
        }
        let limit = if received.started {
            limit
        } else {
            limit.min(BOOT_LIMIT)
        };
        let deadline = trouble_deadline
            .unwrap_or(vm.start + limit)
            .min(vm.start + limit);
        let line = match vm.line(deadline.min(next_check)) {
            Ok(Some(line)) => line,
            Ok(None) => return vm.finish(),
            Err(TimedOut) if Instant::now() < deadline => continue,
            Err(TimedOut) => {
                received.timed_out = true;
                return Ok(None);
            }
        };
        log.write_all(&line)?;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        if let Some(word) = text.strip_prefix("devanon-init: ") {
            if !received.started && echo {
                let seconds = vm.start.elapsed().as_secs_f64();
                eprintln!("devanon-vm: PID 1 after {seconds:.1} s");
            }
            received.init_line(word);
            if received.taint.is_some() || received.error.is_some() {
                vm.acknowledge();
            }
            blank_held = false;
        } else if received.status.is_some() {
            received.unexpected(text);
        } else if echo {
            received.ktap.line(text);
            let mut out = std::io::stdout();
            // PID 1 writes an empty line before its verdict, so this one may not be the command's.
            if std::mem::replace(&mut blank_held, text.is_empty()) {
                writeln!(out).context(STDOUT)?;
            }
            if !blank_held {
                out.write_all(&line).context(STDOUT)?;
            }
        }
    }
}

impl Received {
    /// Processes one of PID 1's own lines, see devanon-init. The command can write such lines, too,
    /// so a line that is not expected at this point is an error, and so is anything after the verdict.
    fn init_line(&mut self, text: &str) {
        let words: Vec<&str> = text.split(' ').collect();
        let hex = |word| u64::from_str_radix(word, 16).ok();
        let expected = match (words.as_slice(), self.started, self.status, self.taint) {
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
        if !expected {
            self.unexpected(text);
        }
    }

    /// The problems with the command's KTAP.
    fn problems(&self, cli: &Cli) -> &[String] {
        if cli.plain || !self.started {
            return &[];
        }
        &self.ktap.problems
    }

    fn unexpected(&mut self, text: &str) {
        self.error.get_or_insert_with(|| {
            format!("unexpected line, so the verdict may be forged: {text}")
        });
    }
}

/// Applies the rules at the top of this file.
fn judge(
    cli: &Cli,
    machine: &Machine,
    received: &Received,
    qemu: Option<ExitStatus>,
) -> Result<Verdict> {
    const TAIL: usize = 30;
    let log = machine.console_text();
    let lines = console::lines(&log);
    let tail = || console::tail(&lines, TAIL).iter().copied();

    let trouble = console::trouble_lines(&lines);
    if let Some(&first) = trouble.first() {
        let informative = |&&n: &&usize| !lines[n].contains(console::CUT_HERE);
        let main = *trouble.iter().find(informative).unwrap_or(&first);
        let reason = format!("line {} of the console: {}", main + 1, lines[main].trim());
        let mut verdict = Verdict::new(Outcome::Trouble, reason);
        let more = trouble.iter().filter(|n| informative(n) && **n != main);
        let more = more.take(TAIL).map(|&n| lines[n].trim().to_owned());
        verdict.findings.extend(more);
        // The whole report of the first sign, then only the lines of the other signs.
        let end = lines.len().min(first + TAIL);
        let others = trouble.iter().filter(|&&n| n >= end);
        let shown = (first..end).chain(others.copied().take(TAIL));
        return Ok(verdict.with(shown.map(|n| format!("{}: {}", n + 1, lines[n]))));
    }
    let taint = received.taint.map_or(String::new(), |(before, after)| {
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

    if !received.started {
        let verdict = match qemu {
            None => Verdict::new(Outcome::Timeout, "PID 1 was not reached"),
            Some(status) => {
                let reason = format!("the VM ended before PID 1 reported; QEMU: {status}");
                let qemu_log = fs::read_to_string(machine.qemu_log()).unwrap_or_default();
                Verdict::new(Outcome::Infrastructure, reason).with(qemu_log.lines())
            }
        };
        return Ok(verdict.with(["the console's last lines:"]).with(tail()));
    }
    if received.timed_out {
        let reason = format!("killed after {} s", cli.time_limit);
        return Ok(Verdict::new(Outcome::Timeout, reason).with(tail()));
    }
    if let Some(error) = &received.error {
        let reason = format!("PID 1: {error}");
        return Ok(Verdict::new(Outcome::Infrastructure, reason).with(received.problems(cli)));
    }
    let (Some(status), Some(_)) = (received.status, received.taint) else {
        let (outcome, what) = match qemu {
            Some(status) if status.success() => {
                (Outcome::Trouble, "the VM went down before the verdict")
            }
            _ => (Outcome::Infrastructure, "QEMU died"),
        };
        return Ok(Verdict::new(outcome, what).with(tail()));
    };
    if qemu.is_none() {
        return Ok(Verdict::new(Outcome::Timeout, "the VM did not power off").with(tail()));
    }

    let problems = received.problems(cli);
    Ok(if status != 0 {
        let reason = format!("the command ended with status {status}");
        let mut verdict = Verdict::new(Outcome::Fail, reason).with(problems);
        // The problems explain the exit status.
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
