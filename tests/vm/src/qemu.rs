// SPDX-License-Identifier: GPL-2.0

//! Runs one QEMU from start to end.

use std::ffi::OsStr;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::fs::File;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::io::FdFlags;
use rustix::io::fcntl_setfd;

/// The machine, without the devices that nothing here uses: each of them costs boot time.
const MACHINE: &str = "q35,i8042=off,hpet=off,smm=off,usb=off,sata=off";

/// TCG without the CPU features that are slow to emulate. With erms and fsrm the kernel copies by `rep movsb`,
/// which TCG executes byte by byte; without them, copies take a third of the time. With pku, TCG drops all
/// translations at each write to PKRU, which happens several times per signal. With smap, each access to user
/// memory ends a translation block twice; KASAN catches stray accesses to user memory, too. VMs that count
/// instructions (icount) keep all features.
const TCG_CPU: &str = "max,-erms,-fsrm,-pku,-smap";

/// Kernel parameters of every VM.
///
/// panic=-1 makes a panic end QEMU at once, and oops=panic does the same for an oops. Warnings must
/// reach the console, so there is no `quiet`. The rest saves time in an emulated machine: it needs no
/// mitigations and no security modules, and its clock is QEMU's. Every kernel can reset by a triple
/// fault. 0x608 is the port of q35's PM timer, which a kernel without ACPI cannot find by itself.
///
/// nohz=off and highres=off keep a periodic tick on every CPU, idle or not; QEMU's APIC rearms it by
/// itself. Otherwise the kernel programs each expiry as a one-shot, and idle CPUs migrate their timers
/// to each other. On a busy machine such a timer has been seen to get lost: an RCU kthread slept 20 s
/// past its timeout on an idle CPU, which was reported as a stall. With a periodic tick, the next tick
/// runs a late timer, so a reported stall is a real one.
const PARAMETERS: &str = "console=ttyS0 panic=-1 oops=panic loglevel=7 mitigations=off \
    reboot=triple pmtmr=0x608 random.trust_cpu=on tsc=reliable no_timer_check audit=0 apparmor=0 cryptomgr.notests \
    nohz=off highres=off";

/// The kernel's limits, with some room to spare: COMMAND_LINE_SIZE, which includes CONFIG_CMDLINE, and
/// CONFIG_INIT_ENV_ARG_LIMIT.
const COMMAND_LINE_LIMIT: usize = 1983;
const WORDS_LIMIT: usize = 28;

/// How long QEMU may take to exit once its VM is down.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// The configuration of a VM.
pub struct Machine {
    pub image: PathBuf,
    /// KVM; false means emulation by TCG.
    pub kvm: bool,
    /// Emulation at one instruction per nanosecond.
    pub icount: bool,
    pub memory: u32,
    pub cpus: u32,
    /// Further kernel parameters.
    pub append: String,
    /// Raw images, writable.
    pub disks: Vec<PathBuf>,
    /// Holds all files of this run.
    pub directory: PathBuf,
}

impl Machine {
    pub fn initramfs(&self) -> PathBuf {
        self.directory.join("initramfs.cpio")
    }

    pub fn console(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    pub fn console_text(&self) -> String {
        let text = fs::read(self.console()).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    pub fn qemu_log(&self) -> PathBuf {
        self.directory.join("qemu.log")
    }

    /// QEMU's command, without the console and the verdict port. PID 1 gets `words`; QEMU gets `signal`
    /// when this runner ends.
    fn command<S: AsRef<OsStr>>(&self, words: &[S], signal: &str) -> Result<Command> {
        let mut parameters = format!("{PARAMETERS} {} --", self.append);
        for word in words {
            parameters.push(' ');
            encode(word.as_ref(), &mut parameters);
        }
        ensure!(
            parameters.len() <= COMMAND_LINE_LIMIT && words.len() <= WORDS_LIMIT,
            "the command is too long for a kernel command line; put it into a script (--file)"
        );

        // QEMU must not outlive this runner, however that ends.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", signal, "qemu-system-x86_64"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-machine", MACHINE])
            .args(match (self.kvm, self.icount) {
                (true, _) => ["-accel", "kvm", "-cpu", "host"],
                (false, false) => ["-accel", "tcg,thread=multi", "-cpu", TCG_CPU],
                (false, true) => ["-accel", "tcg", "-cpu", "max"],
            })
            .args(
                self.icount
                    .then_some(["-icount", "shift=0"])
                    .into_iter()
                    .flatten(),
            )
            // A kernel without ACPI uses the BIOS's MP table, which lists one CPU per socket.
            .args(["-smp", &format!("{0},sockets={0}", self.cpus)])
            .args(["-m", &format!("{}M", self.memory)])
            .arg("-kernel")
            .arg(&self.image)
            .arg("-initrd")
            .arg(self.initramfs())
            .args(["-append", &parameters]);
        for disk in &self.disks {
            // The disk's contents need not survive a crash of this machine.
            let mut drive = OsString::from("if=virtio,format=raw,cache=unsafe,file=");
            drive.push(disk);
            qemu.arg("-drive").arg(drive);
        }
        Ok(qemu)
    }

    /// Saves the command line, so that it can be repeated by hand.
    fn save_command(&self, command: &Command) -> Result<()> {
        Ok(fs::write(
            self.directory.join("qemu-command"),
            format!("{command:?}\n"),
        )?)
    }

    /// Connects the VM's console to this terminal until the VM is down.
    pub fn interact(&self) -> Result<ExitStatus> {
        // On SIGTERM, QEMU restores the terminal before it exits.
        let mut qemu = self.command(&["--shell"], "TERM")?;
        let console = self.console();
        let log = console.to_str().context("the path is not UTF-8")?;
        let chardev = format!("stdio,id=console,mux=on,signal=off,logfile={log}");
        qemu.args(["-chardev", &chardev, "-serial", "chardev:console"])
            .args(["-mon", "chardev=console"]);
        self.save_command(&qemu)?;
        qemu.status().context("cannot run qemu-system-x86_64")
    }

    /// Starts the VM; PID 1 gets `words`.
    pub fn start<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Vm> {
        let mut qemu = self.command(words, "KILL")?;
        let (port, theirs) = UnixStream::pair()?;
        fcntl_setfd(&theirs, FdFlags::empty())?;
        let verdict = format!("socket,id=verdict,fd={}", theirs.as_raw_fd());
        let mut console = OsString::from("file,id=console,path=");
        console.push(self.console());
        qemu.arg("-chardev")
            .arg(console)
            .args(["-serial", "chardev:console"])
            .args(["-device", "virtio-serial-pci", "-chardev", &verdict])
            .args([
                "-device",
                "virtserialport,chardev=verdict,name=org.devanon.verdict",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(self.qemu_log())?);
        self.save_command(&qemu)?;

        let start = Instant::now();
        let child = qemu.spawn().context("cannot run qemu-system-x86_64")?;
        let (sender, lines) = mpsc::channel();
        let mut reader = BufReader::new(port.try_clone()?);
        thread::spawn(move || {
            let mut line = Vec::new();
            // An error ends the loop, too: QEMU is gone.
            while reader
                .read_until(b'\n', &mut line)
                .is_ok_and(|size| size > 0)
            {
                if sender.send(std::mem::take(&mut line)).is_err() {
                    break;
                }
            }
        });
        Ok(Vm {
            start,
            child,
            port,
            lines,
        })
    }
}

/// Percent-encodes a word: the kernel splits its command line at spaces and has its own rules for
/// quotes and equal signs. A lone `%` is an empty word.
fn encode(word: &OsStr, out: &mut String) {
    if word.is_empty() {
        out.push('%');
    }
    for &byte in word.as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b',' | b':' | b'_' | b'-' => {
                out.push(char::from(byte));
            }
            _ => write!(out, "%{byte:02x}").expect("a String takes everything"),
        }
    }
}

/// A running QEMU, killed on drop.
pub struct Vm {
    pub start: Instant,
    child: Child,
    port: UnixStream,
    lines: mpsc::Receiver<Vec<u8>>,
}

impl Vm {
    /// Returns the next line from the verdict port, `None` at its end, or an error at the deadline.
    pub fn line(&self, deadline: Instant) -> Result<Option<Vec<u8>>, TimedOut> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => Ok(Some(line)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Ok(None),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(TimedOut),
        }
    }

    /// Tells PID 1 that its last line has arrived.
    pub fn acknowledge(&mut self) {
        // QEMU may be gone, which the exit status will show.
        let _ = self.port.write_all(b"\n");
    }

    /// Waits for QEMU to exit; returns `None`, and kills it, if it does not within [`EXIT_LIMIT`].
    pub fn finish(mut self) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + EXIT_LIMIT;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(None)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The deadline passed before a line arrived.
pub struct TimedOut;

/// Returns true if KVM can boot the kernel: /dev/kvm may exist and yet fail to run an unmodified one.
/// The result of `trial` is cached in a file and is valid until this machine reboots.
pub fn kvm_works(cache: &Path, trial: impl FnOnce() -> Result<bool>) -> Result<bool> {
    let device = File::options().read(true).write(true).open("/dev/kvm");
    if device.is_err() {
        return Ok(false);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let answer = |works: bool| format!("{} {works}\n", boot.trim());
    let known = fs::read_to_string(cache).unwrap_or_default();
    let works = match [true, false].into_iter().find(|&w| known == answer(w)) {
        Some(works) => works,
        None => {
            let works = trial()?;
            fs::write(cache, answer(works))?;
            works
        }
    };
    if !works {
        eprintln!("devanon-vm: KVM does not work here: a trial boot failed");
    }
    Ok(works)
}
