// SPDX-License-Identifier: GPL-2.0

//! One QEMU, from its start to its end.

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

/// The machine, without what nothing here uses: each device costs boot time.
const MACHINE: &str = "q35,i8042=off,hpet=off,smm=off,usb=off,sata=off";

/// TCG runs an instruction with `rep` once for each byte, if the processor promises that it takes bytes as
/// fast as words. Without that, copies take a third of the time. And at each write of PKRU, which is several
/// times for each signal, it forgets all translations. With SMAP each access to a process's memory ends a block
/// of translated code twice; that the kernel goes there only on purpose is what KASAN sees, too. What is
/// counted stays as it is.
const PROCESSOR: &str = "max,-erms,-fsrm,-pku,-smap";

/// Kernel parameters of every VM.
///
/// panic=-1 makes a panic end QEMU at once, and an oops is a panic. Warnings must reach the console,
/// so `quiet` will not do. The rest saves time in an emulated machine: it has no mitigations to make
/// and no use for security modules, and its clock is QEMU's. A triple fault is the way to reset that
/// every kernel has, and 0x608 is where q35 has its PM timer, which a kernel without ACPI has to be told.
///
/// nohz=off and highres=off keep a periodic tick on every processor, idle or not; QEMU's APIC winds
/// it up again by itself. Otherwise each expiry is programmed once, and idle processors leave their
/// timers to each other. On a busy machine it was seen to happen that one never came: RCU's own
/// thread slept 20 s past its timer, on an idle processor, and that was reported as a stall. Now
/// the next tick makes up for it, and a stall that is reported is one.
const PARAMETERS: &str = "console=ttyS0 panic=-1 oops=panic loglevel=7 mitigations=off \
    reboot=triple pmtmr=0x608 random.trust_cpu=on tsc=reliable no_timer_check audit=0 apparmor=0 cryptomgr.notests \
    nohz=off highres=off";

/// The kernel takes no more (COMMAND_LINE_SIZE less some for its own CONFIG_CMDLINE, and
/// CONFIG_INIT_ENV_ARG_LIMIT less some).
const COMMAND_LINE_LIMIT: usize = 1983;
const WORDS_LIMIT: usize = 28;

/// How long QEMU may take to go once its VM is down.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// A VM to be.
pub struct Machine {
    pub image: PathBuf,
    /// With KVM, or else emulated.
    pub kvm: bool,
    /// Emulated, one instruction a nanosecond.
    pub icount: bool,
    pub memory: u32,
    pub cpus: u32,
    /// Further kernel parameters.
    pub append: String,
    /// Raw images, which are written to.
    pub disks: Vec<PathBuf>,
    /// Where everything of this run is kept.
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

    /// QEMU's command, but for the console and the verdict.
    fn command<S: AsRef<OsStr>>(&self, words: &[S], death: &str) -> Result<Command> {
        let mut parameters = format!("{PARAMETERS} {} --", self.append);
        for word in words {
            parameters.push(' ');
            encode(word.as_ref(), &mut parameters);
        }
        ensure!(
            parameters.len() <= COMMAND_LINE_LIMIT && words.len() <= WORDS_LIMIT,
            "the command is too long for a kernel command line; put it into a script (--file)"
        );

        // However this runner ends, QEMU ends with it.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", death, "qemu-system-x86_64"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-machine", MACHINE])
            .args(match (self.kvm, self.icount) {
                (true, _) => ["-accel", "kvm", "-cpu", "host"],
                (false, false) => ["-accel", "tcg,thread=multi", "-cpu", PROCESSOR],
                (false, true) => ["-accel", "tcg", "-cpu", "max"],
            })
            .args(
                self.icount
                    .then_some(["-icount", "shift=0"])
                    .into_iter()
                    .flatten(),
            )
            // Without ACPI a kernel goes by the BIOS's table, which has one processor of each socket.
            .args(["-smp", &format!("{0},sockets={0}", self.cpus)])
            .args(["-m", &format!("{}M", self.memory)])
            .arg("-kernel")
            .arg(&self.image)
            .arg("-initrd")
            .arg(self.initramfs())
            .args(["-append", &parameters]);
        for disk in &self.disks {
            // Nobody needs what is on it after a crash of this machine.
            let mut drive = OsString::from("if=virtio,format=raw,cache=unsafe,file=");
            drive.push(disk);
            qemu.arg("-drive").arg(drive);
        }
        Ok(qemu)
    }

    /// Keeps the command line, for whoever wants to repeat it by hand.
    fn note(&self, command: &Command) -> Result<()> {
        Ok(fs::write(
            self.directory.join("qemu-command"),
            format!("{command:?}\n"),
        )?)
    }

    /// Gives the VM's console to this terminal until the VM is down.
    pub fn interact(&self) -> Result<ExitStatus> {
        // SIGTERM lets QEMU put the terminal right before it goes.
        let mut qemu = self.command(&["--shell"], "TERM")?;
        let console = self.console();
        let log = console.to_str().context("the path is not UTF-8")?;
        let chardev = format!("stdio,id=console,mux=on,signal=off,logfile={log}");
        qemu.args(["-chardev", &chardev, "-serial", "chardev:console"])
            .args(["-mon", "chardev=console"]);
        self.note(&qemu)?;
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
        self.note(&qemu)?;

        let start = Instant::now();
        let child = qemu.spawn().context("cannot run qemu-system-x86_64")?;
        let (sender, lines) = mpsc::channel();
        let mut reader = BufReader::new(port.try_clone()?);
        thread::spawn(move || {
            let mut line = Vec::new();
            // An error is an end, too: QEMU is gone.
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

/// Percent-encodes a word: the kernel splits its command line at spaces and has its own ideas of
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

/// A running QEMU. Dropped, it is killed.
pub struct Vm {
    pub start: Instant,
    child: Child,
    port: UnixStream,
    lines: mpsc::Receiver<Vec<u8>>,
}

impl Vm {
    /// The next line from the verdict port, `None` at its end, an error at the deadline.
    pub fn line(&self, deadline: Instant) -> Result<Option<Vec<u8>>, TimedOut> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => Ok(Some(line)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Ok(None),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(TimedOut),
        }
    }

    /// Tells PID 1 that its last line has come.
    pub fn acknowledge(&mut self) {
        // QEMU may be gone: that shows elsewhere.
        let _ = self.port.write_all(b"\n");
    }

    /// Waits for QEMU to end by itself; `None` if it does not.
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

/// The deadline came first.
pub struct TimedOut;

/// Does KVM run this machine? Remembered until the next boot: /dev/kvm may be there and yet not
/// run an unmodified kernel.
pub fn kvm_works(memo: &Path, try_it: impl FnOnce() -> Result<bool>) -> Result<bool> {
    let device = File::options().read(true).write(true).open("/dev/kvm");
    if device.is_err() {
        return Ok(false);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let answer = |works: bool| format!("{} {works}\n", boot.trim());
    let known = fs::read_to_string(memo).unwrap_or_default();
    let works = match [true, false].into_iter().find(|&w| known == answer(w)) {
        Some(works) => works,
        None => {
            let works = try_it()?;
            fs::write(memo, answer(works))?;
            works
        }
    };
    if !works {
        eprintln!("devanon-vm: KVM was tried here and does not work: the kernel did not boot");
    }
    Ok(works)
}
