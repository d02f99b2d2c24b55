// SPDX-License-Identifier: GPL-2.0

//! Tests of `ubd=mmap`, which maps pages of a disk image in place of the guest's memory. Files must stay
//! correct whatever is done to them, the image must never change, and the filesystem must be clean.

use std::collections::HashMap;
use std::fs;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::mount::MountFlags;
use rustix::mount::mount;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;

use crate::guest::Guest;
use crate::guest::IMAGE;
use crate::guest::Setup;
use crate::host;
use crate::host::Backing;
use crate::kernel::ROOM;
use crate::kernel::mount_room;
use crate::kernel::on;
use crate::kernel::prepare;
use crate::kernel::wait_excess;
use crate::ktap;
use crate::ktap::Place;
use crate::ktap::Test;
use crate::report;
use crate::userland::plug_while_it_works;

const MAX_MAPS: &str = "/proc/sys/vm/max_map_count";
/// The workload of the small guests on three filesystems. A suffix names the filesystem.
const FILES: &str = "/lib/devanon/files";
const DISK: &str = "/var/disk";
/// For tests in which the mode does not matter.
const FASTER: &str = "seccomp=on";
const TRACING: &str = "/sys/kernel/tracing";

struct State {
    /// The long form: with --here, tests run for longer; in the VM, all tests run.
    long: bool,
    /// Run on the machine itself, where guests are many times faster: on memfds, and without changing
    /// the machine.
    here: bool,
    /// With what `make test` leaves to `make test-all`.
    more: bool,
    /// Checksum of the image before any guest ran.
    sum: String,
}

impl State {
    /// The backing of the guests' memory.
    fn backing(&self) -> Backing {
        if self.here {
            Backing::Memfd
        } else {
            Backing::Anon
        }
    }
}

const TESTS: &[(Place, Test<State>)] = &[
    (
        Place::Both,
        (
            "concurrent guests of one image: all files are correct, and their memory has no copies",
            shared_image,
        ),
    ),
    (
        Place::Here,
        (
            "files are written to, mapped by others, poked: ptrace",
            ptrace,
        ),
    ),
    (
        Place::VmMore,
        (
            "files are written to, mapped by others, poked: ptrace",
            ptrace,
        ),
    ),
    (
        Place::Here,
        (
            "files are also removed, and all that is mapped is compared: seccomp, two CPUs",
            two_cpus,
        ),
    ),
    (Place::Vm, ("read-only ext4, EROFS and squashfs", read_only)),
    (
        Place::Vm,
        (
            "what cannot be mapped is read, and the log says why",
            not_mapped,
        ),
    ),
    (
        Place::VmMore,
        ("a low vm.max_map_count: the rest is read", few_mappings),
    ),
    (
        Place::Here,
        (
            "the host kills a process of the guest, traced or not: no other process dies",
            killed_process,
        ),
    ),
    (
        Place::Here,
        (
            "an image that is truncated: errors, nothing worse",
            truncated,
        ),
    ),
    (
        Place::Here,
        (
            "without ubd=mmap nothing is mapped; partially changed pages are read correctly",
            partly_changed,
        ),
    ),
    (
        Place::Here,
        (
            "a COW file on a full disk, with another image, truncated, removed: old data is intact",
            cow_files,
        ),
    ),
    (
        Place::Vm,
        ("a flush in the guest is a flush on the host", flush),
    ),
    (
        Place::Vm,
        (
            "writes that the host cannot take at once, or not in this form, are not lost",
            retried_writes,
        ),
    ),
    (
        Place::Here,
        ("SIGKILL loses nothing that was flushed", killed),
    ),
    (
        Place::Both,
        ("the image is unchanged after all tests", unchanged),
    ),
];

pub fn run(long: bool, here: bool, more: bool, only: Option<&str>) -> bool {
    let sum = match checksum(IMAGE) {
        Ok(sum) => sum,
        Err(error) => return report(Err(error)),
    };
    // In the VM the long form runs all tests.
    let tests = if long && !here {
        ktap::all(TESTS)
    } else {
        ktap::select(TESTS, here, more)
    };
    let prepared = if here { mount_room() } else { prepare() };
    let state = State {
        long,
        here,
        more,
        sum,
    };
    prepared && ktap::run(&tests, only, &mut { state })
}

fn output(program: &str, arguments: &[&str]) -> Result<(i32, String)> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| program.to_owned())?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text += &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.code().context("killed")?, text))
}

fn checksum(file: &str) -> Result<String> {
    let (code, text) = output("sha256sum", &[file])?;
    ensure!(code == 0, "{text}");
    Ok(text)
}

/// The contents of the guest's /proc/ubd_mmap.
pub struct Counters(pub String);

impl Counters {
    fn read(guest: &Guest) -> Result<Self> {
        Ok(Self(guest.mconsole()?.proc("ubd_mmap")?))
    }

    pub fn get(&self, name: &str) -> Result<i64> {
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
            .and_then(|rest| rest.split(' ').next()?.parse().ok())
            .with_context(|| format!("no {name} in: {}", self.0))
    }

    /// Checks that these are not zero.
    fn check_nonzero(&self, names: &[&str]) -> Result<()> {
        for name in names {
            ensure!(self.get(name)? > 0, "no {name} in: {}", self.0);
        }
        Ok(())
    }

    /// Checks that these have grown since `before`.
    fn check_grown(&self, before: &Self, names: &[&str]) -> Result<()> {
        for name in names {
            ensure!(
                self.get(name)? > before.get(name)?,
                "{name} has not grown in: {}",
                self.0
            );
        }
        Ok(())
    }

    /// Checks that `ubd=mmap,verify` has compared all that was mapped.
    fn check_compared(&self) -> Result<()> {
        let (mapped, compared) = (self.get("mapped")?, self.get("compared")?);
        ensure!(mapped > 0 && compared >= mapped, "{}", self.0);
        Ok(())
    }

    /// Checks that nothing went wrong.
    fn check_no_errors(&self) -> Result<()> {
        self.check_zero(&["lost", "refused_differs", "refused_host"])
    }

    /// Checks that these are zero.
    fn check_zero(&self, names: &[&str]) -> Result<()> {
        for name in names {
            ensure!(self.get(name)? == 0, "{name} in: {}", self.0);
        }
        Ok(())
    }

    fn summary(&self) -> Result<String> {
        Ok(format!(
            "{} pages mapped, {} now in {} runs; promoted: {} by writes, {} by mappings, {} by I/O",
            self.get("mapped")?,
            self.get("pages")?,
            self.get("runs")?,
            self.get("promoted_write")?,
            self.get("promoted_pte")?,
            self.get("promoted_io")?
        ))
    }
}

/// Writes the disk of a guest that has ended to a file: the image, overlaid with the COW file. The next
/// call replaces that file.
fn merge_cow(cow: &str, image: &str) -> Result<String> {
    const CHUNK: usize = 64 << 10;
    let cow = File::open(cow)?;
    let image = File::open(image)?;
    let mut header = [0; 32];
    cow.read_exact_at(&mut header, 0)?;
    let word = |at: usize| {
        u64::from(u32::from_be_bytes(
            header[at..at + 4].try_into().expect("four bytes"),
        ))
    };
    ensure!(word(0) == 0x4f4f_4f4d && word(4) == 3, "not a COW file");
    let size = (word(12) << 32) | word(16);
    let (sector, align) = (word(20), word(24));
    ensure!(
        sector == 512 && size == image.metadata()?.len(),
        "size {size}, sectors of {sector}"
    );
    let bitmap_at = (32 + 4096u64).next_multiple_of(align);
    let mut bitmap = vec![0; size.div_ceil(sector).div_ceil(8) as usize];
    cow.read_exact_at(&mut bitmap, bitmap_at)?;
    let data_at = (bitmap_at + bitmap.len() as u64).next_multiple_of(align);

    let path = format!("{ROOM}/merged");
    let _ = fs::remove_file(&path);
    let merged = File::create_new(&path)?;
    merged.set_len(size)?;
    let mut chunk = [0; CHUNK];
    for (number, changed) in bitmap.chunks(CHUNK / 512 / 8).enumerate() {
        let at = (number * CHUNK) as u64;
        let chunk = &mut chunk[..(size - at).min(CHUNK as u64) as usize];
        image.read_exact_at(chunk, at)?;
        for (number, sector) in chunk.chunks_mut(512).enumerate() {
            if (changed[number / 8] >> (number % 8)) & 1 != 0 {
                cow.read_exact_at(sector, data_at + at + number as u64 * 512)?;
            }
        }
        if chunk.iter().any(|&byte| byte != 0) {
            merged.write_all_at(chunk, at)?;
        }
    }
    Ok(path)
}

/// Checks that the filesystem on the disk of a guest that has ended is clean. For a killed guest, first
/// replays the journal.
fn check_disk(guest: &Guest, replay: bool) -> Result<()> {
    let disk = merge_cow(&guest.cow_file(), IMAGE)?;
    if replay {
        let (code, text) = output("e2fsck", &["-E", "journal_only", "-y", &disk])?;
        ensure!(code <= 1, "e2fsck: {text}");
    }
    fsck(&disk)
}

fn fsck(disk: &str) -> Result<()> {
    let (code, text) = output("e2fsck", &["-fn", disk])?;
    ensure!(code == 0, "e2fsck: {text}");
    Ok(())
}

/// Starts a guest of 256 MiB with just a shell.
fn start(setup: Setup) -> Result<Guest> {
    wait_shell(setup.single().size(256).start()?)
}

/// Debian, or in the VM just a shell: there, booting all of Debian takes most of a test's time.
fn with_userland(state: &State, setup: Setup) -> Setup {
    if state.here {
        setup.debian()
    } else {
        setup.single()
    }
}

/// Waits for the guest's shell.
fn wait_shell(mut guest: Guest) -> Result<Guest> {
    guest.wait_up()?;
    guest.log_in()?;
    Ok(guest)
}

/// Checks that the mapped pages, which are all in use in the guest, cost next to none of the guest's memory
/// on the host.
fn check_sharing(guest: &Guest) -> Result<Counters> {
    let counters = Counters::read(guest)?;
    let kib = counters.get("pages")? * 4;
    let excess = wait_excess(guest, -kib * 95 / 100)?;
    eprintln!(
        "{}: {kib} KiB mapped; the host pays {} KiB less than the guest uses",
        guest.name, -excess
    );
    Ok(counters)
}

/// The image is larger than the memory of any guest, and its files fit only into that of the first. In the VM
/// each guest checks a quarter of the files, which does not fit into its memory either.
fn shared_image(state: &mut State) -> Result<String> {
    let (number, words, least) = match (state.here, state.long) {
        (true, _) => (8, "image", 32768),
        (false, true) => (8, "image 4", 8192),
        (false, false) => (2, "image 4", 8192),
    };
    let start = |number| {
        let setup = on(number, state.backing()).with(&["ubd=mmap", FASTER]);
        let size = match (state.here, number) {
            (true, 1) => 256,
            (true, _) => 128,
            (false, _) => 80,
        };
        with_userland(state, setup).size(size).start()
    };
    let started: Result<Vec<_>> = (1..=number).map(start).collect();
    let mut guests = Vec::new();
    for guest in started? {
        guests.push(wait_shell(guest)?);
    }
    for guest in &mut guests {
        guest.begin("work", words)?;
    }
    let mut text = String::new();
    for guest in &mut guests {
        guest.finish("work", words)?;
        let counters = check_sharing(guest)?;
        counters.check_no_errors()?;
        counters.check_zero(&["refused_mappings"])?;
        counters.check_nonzero(&["restored_freed", "refused_page"])?;
        let room = guest.size() / 4;
        let (pages, mapped) = (counters.get("pages")?, counters.get("mapped")?);
        ensure!(pages > room / 6 && mapped > least, "{}", counters.0);
        // The page cache has little else: written files, and tmpfs.
        let meminfo = guest.mconsole()?.proc("meminfo")?;
        let cached = host::field(&meminfo, "Cached")? / 4;
        ensure!(
            cached < pages + 1024,
            "{cached} pages are cached, {pages} of them mapped"
        );
        text += &format!("{}\n", counters.summary()?);
    }
    for guest in &mut guests {
        guest.power_off()?;
        check_disk(guest, false)?;
    }
    Ok(text)
}

/// The counters that a word of tests/guest/disk must increase.
fn expected_counters(words: &str) -> &'static [&'static str] {
    match words.split(' ').next().unwrap_or_default() {
        "write" => &[
            "mapped",
            "promoted_write",
            "promoted_pte",
            "restored_freed",
            "refused_changed",
        ],
        "cut" => &["mapped", "restored_freed"],
        "watch" => &["mapped", "promoted_write", "generations"],
        "direct" => &["mapped", "promoted_io"],
        "exec" | "press" => &["mapped", "restored_freed"],
        "node" => &["mapped", "restored_freed", "refused_page"],
        _ => &[],
    }
}

/// Runs these words of tests/guest/disk while a quarter of the memory is unplugged and plugged. Not during "cut":
/// mainline UML does not stop a process on another CPU when a page not from an image moves or is reclaimed.
fn run_words(setup: Setup, words: &'static [&'static str], verify: bool) -> Result<String> {
    let mut guest = wait_shell(setup.size(256).start()?)?;
    let mut cycles = 0;
    let mut counters = Counters::read(&guest)?;
    for words in words {
        if words.starts_with("cut") {
            guest.run("disk", words)?;
        } else {
            let short = words.starts_with("press");
            cycles += plug_while_it_works(&mut guest, "disk", words, short)?;
        }
        let before = counters;
        counters = Counters::read(&guest)?;
        counters
            .check_grown(&before, expected_counters(words))
            .context(*words)?;
    }
    counters.check_no_errors()?;
    if verify {
        counters.check_compared()?;
    }
    guest.power_off()?;
    check_disk(&guest, false)?;
    Ok(format!(
        "{}\na quarter unplugged and plugged {cycles} times",
        counters.summary()?
    ))
}

const LONG_WORDS: &[&str] = &[
    "cut 20",
    "write 60",
    "watch 30",
    "direct 30",
    "poke 30",
    "exec 60",
    "press 60",
    "write 60",
    "node 1000000",
];
const ALL_WORDS: &[&str] = &[
    "cut 5",
    "write 10",
    "watch 5",
    "direct 5",
    "poke 5",
    "exec 10",
    "press 10",
    "node 1000000",
];
/// The same for `make test`.
const SHORT_WORDS: &[&str] = &[
    "cut 3",
    "write 5",
    "watch 3",
    "direct 3",
    "poke 3",
    "exec 5",
    "press 5",
    "node 1000000",
];
/// The words that depend on how processes map memory.
const MAPPING_WORDS: &[&str] = &["write 5", "watch 5", "poke 3"];

fn words_for(state: &State, short: &'static [&'static str]) -> &'static [&'static str] {
    match (state.long, state.here) {
        (true, true) => LONG_WORDS,
        (false, false) => short,
        (false, true) if !state.more => SHORT_WORDS,
        _ => ALL_WORDS,
    }
}

fn ptrace(state: &mut State) -> Result<String> {
    let setup = on(1, state.backing()).with(&["ubd=mmap"]);
    let words = if state.here && !state.more && !state.long {
        MAPPING_WORDS
    } else {
        words_for(state, MAPPING_WORDS)
    };
    run_words(with_userland(state, setup), words, false)
}

fn two_cpus(state: &mut State) -> Result<String> {
    let setup = on(1, state.backing()).with(&["ubd=mmap,verify", "seccomp=on", "ncpus=2"]);
    run_words(
        with_userland(state, setup),
        words_for(state, ALL_WORDS),
        true,
    )
}

/// The same files on three filesystems. Files that squashfs decompresses cannot be mapped. On the host, two
/// images are on ext4, the others on tmpfs. The name of the one with a COW file is taken by a new file while the
/// guest runs.
fn read_only(_: &mut State) -> Result<String> {
    host::mount_disk("/dev/vda", DISK)?;
    let replaced = format!("{DISK}/files.ext4");
    fs::copy(format!("{FILES}.ext4"), &replaced)?;
    let kept = format!("{DISK}/kept");
    let _ = fs::remove_file(&kept);
    fs::hard_link(&replaced, &kept)?;
    let cow = "/var/files.cow";
    let _ = fs::remove_file(cow);
    // For each: its filesystem, UML's option without the number, and the file that must not change.
    let disks = [
        ("ext4", format!("={cow},{replaced}"), kept),
        (
            "erofs",
            format!("r={DISK}/files.erofs"),
            format!("{DISK}/files.erofs"),
        ),
        (
            "squashfs",
            format!("r={FILES}.squashfs"),
            format!("{FILES}.squashfs"),
        ),
        ("ext4", format!("r={FILES}.ext4"), format!("{FILES}.ext4")),
    ];
    let mut setup = on(1, Backing::Anon).with(&["ubd=mmap,verify", FASTER]);
    let mut sums = Vec::new();
    for (number, (_, option, file)) in (1..).zip(&disks) {
        setup = setup.with(&[&format!("ubd{number}{option}")]);
        sums.push(checksum(file)?);
    }
    let mut guest = start(setup)?;
    let replacement = format!("{DISK}/replacement");
    random_disk(&replacement)?;
    fs::rename(&replacement, &replaced)?;
    let mut text = String::new();
    for (letter, ((kind, ..), sum)) in ('b'..).zip(disks.iter().zip(&sums)) {
        let before = Counters::read(&guest)?.get("mapped")?;
        guest.work(&format!("read {letter} {kind}"))?;
        let counters = Counters::read(&guest)?;
        let mapped = counters.get("mapped")? - before;
        text += &format!("{kind}: {mapped} pages mapped\n");
        // The programs that check are on the root disk. They are read only the first time.
        ensure!(
            (mapped > 1000) == (*kind != "squashfs"),
            "{text}{}",
            counters.0
        );
        counters.check_no_errors()?;
        counters.check_compared()?;
        guest.say(&format!("echo; sha256sum /dev/ubd{letter}"))?;
        let sum = sum.split(' ').next().context("no checksum")?;
        guest.expect(&format!("{sum} "))?;
    }
    // One process maps pages of two disks at once.
    guest.say("mount -t ext4 -o ro /dev/ubde /mnt")?;
    guest.run("disk", "batch")?;
    guest.say("umount /mnt")?;
    // The disk with a COW file can be written to, and is read back correctly.
    guest.say(
        "mount -t ext4 /dev/ubdb /mnt && cp -r /mnt/crates/core_arch /mnt/copy && umount /mnt && \
         mount -t ext4 /dev/ubdb /mnt && diff -r /mnt/crates/core_arch /mnt/copy && umount /mnt; \
         set -- $?; echo; echo copied with $1",
    )?;
    ensure!(guest.expect("copied with ")? == "0", "the copy differs");
    guest.power_off()?;
    fsck(&merge_cow(cow, &disks[0].2)?)?;
    fs::remove_file(cow)?;
    for ((.., file), sum) in disks.iter().zip(&sums) {
        ensure!(&checksum(file)? == sum, "{file} has changed");
    }
    check_disk(&guest, false)?;
    Ok(text)
}

/// Returns matching lines of the guest's kernel log.
fn kernel_log(guest: &mut Guest, pattern: &str) -> Result<Vec<String>> {
    guest.output_of(&format!("dmesg | grep -e '{pattern}' | sed 's/^.*] //'"))
}

/// Creates a disk of random data that guests can write to.
fn random_disk(path: &str) -> Result<()> {
    let mut bytes = vec![0; 1 << 20];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    fs::write(path, &bytes)?;
    host::chmod(path, 0o666)
}

fn not_mapped(_: &mut State) -> Result<String> {
    let writable = format!("{ROOM}/writable");
    random_disk(&writable)?;
    let noexec = format!("{ROOM}/noexec");
    fs::create_dir_all(&noexec)?;
    mount("noexec", noexec.as_str(), "tmpfs", MountFlags::NOEXEC, None)?;
    let forbidden = format!("{noexec}/forbidden");
    random_disk(&forbidden)?;
    let mut guest = start(on(1, Backing::Anon).with(&[
        "ubd=mmap",
        FASTER,
        &format!("ubd1={writable}"),
        &format!("ubd2r={forbidden}"),
    ]))?;
    let lines = kernel_log(&mut guest, "^.*ubd[a-z]: ")?;
    ensure!(
        lines
            == [
                format!("ubda: what is read from {IMAGE} is mapped"),
                "ubdb: read, not mapped: for ubd=mmap it needs a COW file, or the 'r' flag"
                    .to_owned(),
                "ubdc: read, not mapped: the image is on a filesystem mounted noexec, err = -1"
                    .to_owned(),
            ],
        "{lines:?}"
    );
    // Reads of less than a page, of pages not in the page cache, and of changed pages.
    guest.say(
        "dd if=/dev/ubda of=/dev/null bs=512 count=8 iflag=direct 2>/dev/null; \
         dd if=/dev/ubda of=/dev/null bs=64k count=8 iflag=direct 2>/dev/null; \
         echo changed >>/root/hello.c; sync; echo 3 >/proc/sys/vm/drop_caches; cat /root/hello.c >/dev/null; \
         echo; echo read",
    )?;
    guest.expect("read")?;
    let counters = Counters::read(&guest)?;
    counters.check_nonzero(&["refused_partial", "refused_page", "refused_changed"])?;
    counters.check_no_errors()?;
    counters.check_zero(&["refused_mappings"])?;
    guest.power_off()?;
    check_disk(&guest, false)?;
    drop(guest);

    // Mappings of the device itself do not merge, so their number cannot be predicted.
    let mut guest = start(on(2, Backing::Device).with(&["ubd=mmap", FASTER]))?;
    let lines = kernel_log(&mut guest, "ubda: ")?;
    ensure!(
        lines == ["ubda: read, not mapped: the host cannot do it, err = -95"],
        "{lines:?}"
    );
    let counters = Counters::read(&guest)?;
    counters.check_zero(&["images", "mapped"])?;
    guest.power_off()?;
    check_disk(&guest, false)?;
    Ok(String::new())
}

fn few_mappings(_: &mut State) -> Result<String> {
    const FEW: usize = 2400;
    let before = fs::read_to_string(MAX_MAPS)?;
    fs::write(MAX_MAPS, FEW.to_string())?;
    let result = with_few_mappings(FEW, &before);
    fs::write(MAX_MAPS, before)?;
    result
}

/// Half of the files are read and some are changed. A process that needs more mappings than the limit is killed,
/// traced or not, and no other process. Then many pages in the middle of runs are changed. UML keeps to the limit
/// that it read at its start. The processes that map such pages need more mappings, so the limit is lifted first.
fn with_few_mappings(few: usize, before: &str) -> Result<String> {
    let mut guest = start(on(1, Backing::Anon).with(&["ubd=mmap", FASTER]))?;
    guest.work("image 2")?;
    let mut most = run_and_count_mappings(&mut guest, "write 5")?;
    guest.say("disk pieces; echo ended with $?")?;
    ensure!(
        guest.expect("ended with ")? == "139",
        "not killed with a limit of {few}"
    );
    ensure!(
        !kernel_log(&mut guest, "UML ran out of memory on the host side")?.is_empty(),
        "the log does not say so"
    );
    guest.run("disk", "traced")?;
    fs::write(MAX_MAPS, before)?;
    most = most.max(run_and_count_mappings(&mut guest, "split")?);
    ensure!(most < few * 3 / 4, "{most} mappings of {few}");
    // UML counts all mappings but those of its own program and of vmalloc().
    let counters = Counters::read(&guest)?;
    let (mappings, runs) = (host::mappings(guest.pid())?.0, counters.get("runs")?);
    ensure!(
        (mappings as i64) < runs + few as i64 / 8,
        "{mappings} mappings, and UML counts {runs}"
    );
    counters.check_nonzero(&["refused_mappings", "promoted_neighbor"])?;
    ensure!(counters.get("mapped")? > 1000, "{}", counters.0);
    // There are too many mappings to add more, until UML has joined those that need not be separate.
    // Files in root/files were changed above.
    guest.say(
        "echo 3 >/proc/sys/vm/drop_caches; cd /; \
         grep -v ' root/files/' /root/image.sha256 | sed -n 0~2p | sha256sum --quiet -c; set -- $?; echo; echo read with $1",
    )?;
    ensure!(guest.expect("read with ")? == "0", "files are wrong");
    let last = Counters::read(&guest)?;
    last.check_grown(&counters, &["joined", "mapped"])?;
    last.check_no_errors()?;
    guest.power_off()?;
    check_disk(&guest, false)?;
    Ok(format!(
        "at most {most} mappings, then {mappings}, of which UML counts {runs}; {} were joined\n{}",
        last.get("joined")?,
        last.summary()?
    ))
}

/// Runs `disk`, and returns the largest number of mappings that UML had meanwhile.
fn run_and_count_mappings(guest: &mut Guest, words: &str) -> Result<usize> {
    let mut most = 0;
    guest.begin("disk", words)?;
    while !guest.is_done("disk", words)? {
        most = most.max(host::mappings(guest.pid())?.0);
        thread::sleep(Duration::from_millis(100));
    }
    Ok(most)
}

/// First kills a process with two threads, one of which waits for the other. Then a sleeping process that
/// has pages to map when it wakes up: one page when traced, many when not.
fn killed_process(state: &mut State) -> Result<String> {
    let mut guest = start(on(1, state.backing()).with(&["ubd=mmap", "seccomp=on", "ncpus=2"]))?;
    guest.say("disk spin; echo ended with $?")?;
    guest.expect("disk: spinning")?;
    let busiest = host::busiest_child(guest.pid())?;
    kill_and_check(&mut guest, busiest, "Unexpectedly lost MM child")?;

    for (words, mode) in [("line", "seccomp=off"), ("apart", "seccomp=on")] {
        let mut guest = start(on(1, state.backing()).with(&["ubd=mmap", mode]))?;
        guest.say(&format!("disk {words}; echo ended with $?"))?;
        guest.expect("disk: waiting")?;
        thread::sleep(Duration::from_secs(3));
        // The process that was started last.
        let last = host::children(guest.pid())?.into_iter().max();
        kill_and_check(
            &mut guest,
            last.context("no process")?,
            "cannot run the stub",
        )?;
    }
    Ok(String::new())
}

/// Kills a process of the guest on the host. The guest's log must contain `sentence`, and the guest must go on.
fn kill_and_check(guest: &mut Guest, process: i32, sentence: &str) -> Result<()> {
    kill_process(Pid::from_raw(process).context("no process")?, Signal::KILL)?;
    guest.say("")?;
    ensure!(guest.expect("ended with ")? == "139", "the process goes on");
    ensure!(
        !kernel_log(guest, sentence)?.is_empty(),
        "the log does not say so"
    );
    guest.work("compile")?;
    guest.power_off()?;
    check_disk(guest, false)
}

fn truncated(state: &mut State) -> Result<String> {
    let short = format!("{ROOM}/short");
    fs::copy(format!("{FILES}.ext4"), &short)?;
    host::chmod(&short, 0o666)?;
    let mut guest =
        start(on(1, state.backing()).with(&["ubd=mmap", FASTER, &format!("ubd1r={short}")]))?;
    guest.work("read b ext4")?;
    guest.say(
        "mount -o ro /dev/ubdb /mnt; find /mnt -type f -exec cat {} + >/dev/null; echo; echo whole",
    )?;
    guest.expect("whole")?;
    guest.begin("disk", "bus")?;
    guest.expect("disk: mapped")?;
    let file = File::options().write(true).open(&short)?;
    // Truncate at a page boundary: part of a page across the new end would still be correct.
    file.set_len(file.metadata()?.len() / 6 / 4096 * 4096)?;
    guest.say("")?;
    guest.finish("disk", "bus")?;
    // First read mapped pages that are gone, then the disk.
    guest.say("find /mnt -type f -exec cat {} + >/dev/null; echo; echo memory")?;
    guest.expect("memory")?;
    guest.run("disk", "lost")?;
    guest.say("echo 3 >/proc/sys/vm/drop_caches; find /mnt -type f -exec cat {} + >/dev/null 2>&1 || echo; echo failed")?;
    guest.expect("failed")?;
    let errors = kernel_log(&mut guest, "I/O error, dev ubdb")?.len();
    ensure!(errors > 0, "no I/O error in the log");
    let counters = Counters::read(&guest)?;
    counters.check_nonzero(&["lost"])?;
    guest.work("compile")?;
    guest.power_off()?;
    check_disk(&guest, false)?;
    Ok(format!(
        "{} pages lost, {errors} errors",
        counters.get("lost")?
    ))
}

/// Without ubd=mmap, /proc/ubd_mmap does not exist.
fn partly_changed(state: &mut State) -> Result<String> {
    let backing = format!("{ROOM}/backing");
    random_disk(&backing)?;
    let cow = "/var/partly.cow";
    let _ = fs::remove_file(cow);
    let mut guest =
        start(on(1, state.backing()).with(&[FASTER, &format!("ubd1={cow},{backing}")]))?;
    guest.run("disk", "partly")?;
    ensure!(
        guest.mconsole()?.proc("ubd_mmap").is_err(),
        "/proc/ubd_mmap exists"
    );
    guest.power_off()?;
    fs::remove_file(cow)?;
    check_disk(&guest, false)?;
    Ok(String::new())
}

/// Data that the host has no room for keeps its old value, in this guest and after a reboot. A COW file that is not
/// intact is not opened at all.
fn cow_files(state: &mut State) -> Result<String> {
    const PAGES: u64 = 2048;
    /// The image's size in sectors.
    const SIZE: &str = "16384";
    /// How many pages `disk full` writes at once.
    const BATCH: u64 = 16;
    let words = |word: u64| word.to_le_bytes().repeat(4096 / 8);
    let (small, image, other) = (
        format!("{ROOM}/small"),
        format!("{ROOM}/numbers"),
        format!("{ROOM}/other"),
    );
    let old: Vec<u8> = (0..PAGES).flat_map(|page| words(!page)).collect();
    fs::write(&image, old)?;
    File::create(&other)?.set_len(8 * PAGES * 4096)?;
    fs::create_dir_all(&small)?;
    mount(
        "tmpfs",
        small.as_str(),
        "tmpfs",
        MountFlags::empty(),
        Some(c"size=4m"),
    )?;
    host::chmod(&small, 0o777)?;
    fs::write(format!("{small}/rest"), vec![1; 2 << 20])?;
    let cow = format!("{small}/cow");
    let disk = format!("{cow},{image}");
    let mut guest = start(on(1, state.backing()).with(&[FASTER, &format!("ubd1={disk}")]))?;
    guest.begin("disk", "full")?;
    let full = guest.expect("disk: full ")?;
    let full: u64 = full.parse().with_context(|| full.clone())?;
    fs::remove_file(format!("{small}/rest"))?;
    guest.say("")?;
    guest.finish("disk", "full")?;
    guest.kill(Signal::KILL)?;
    guest.wait(&[128 + 9])?;
    let merged = fs::read(merge_cow(&cow, &image)?)?;
    for (number, page) in (0..).zip(merged.chunks(4096)) {
        let (new, old) = (page == words(number + 1), page == words(!number));
        let right = match number {
            number if number < full || (full + BATCH..full + 2 * BATCH).contains(&number) => new,
            number if number < full + BATCH => new || old,
            _ => old,
        };
        ensure!(right, "page {number} begins with {:x?}", &page[..8]);
    }

    // The bitmap begins at 4 KiB.
    let short = format!("{ROOM}/short.cow");
    fs::copy(&cow, &short)?;
    File::options()
        .write(true)
        .open(&short)?
        .set_len(4096 + 100)?;
    host::chmod(&short, 0o666)?;
    let setup = on(1, state.backing()).with(&[
        FASTER,
        &format!("ubd1={cow},{other}"),
        &format!("ubd2={short},{image}"),
    ]);
    let mut guest = start(setup)?;
    let console = guest.mconsole()?;
    let size =
        |guest: &mut Guest, name: &str| guest.output_of(&format!("cat /sys/block/{name}/size"));
    ensure!(
        size(&mut guest, "ubdb")? == [SIZE],
        "the disk has the size of another image"
    );
    ensure!(
        guest
            .output_of("ls -d /sys/block/ubdc 2>/dev/null")?
            .is_empty(),
        "a disk with a truncated bitmap exists"
    );
    let fresh = format!("{ROOM}/fresh.cow");
    for (words, good) in [
        ("remove ubd2".to_owned(), false),
        (format!("config ubd2={fresh},{image}"), true),
        ("remove ubd2".to_owned(), true),
        ("remove ubd1".to_owned(), true),
        (format!("config ubd1d={small}/none"), false),
        ("config ubd1dx=".to_owned(), false),
        (format!("config ubd1={disk}"), true),
    ] {
        let mut answer = console.ask(&words)?;
        // The guest may still be scanning the disk for partitions.
        for _ in 0..50 {
            if !answer
                .as_ref()
                .is_err_and(|text| text.contains("currently open"))
            {
                break;
            }
            thread::sleep(Duration::from_millis(100));
            answer = console.ask(&words)?;
        }
        ensure!(answer.is_ok() == good, "{words}: {answer:?}");
    }
    ensure!(
        size(&mut guest, "ubdb")? == [SIZE],
        "the disk has the wrong size"
    );
    let first = guest.output_of("dd if=/dev/ubdb bs=8 count=1 2>/dev/null | od -An -td8")?;
    ensure!(first.len() == 1 && first[0].trim() == "1", "{first:?}");
    guest.power_off()?;
    check_disk(&guest, false)?;
    Ok(format!("no room for page {full}"))
}

/// The socket to UML's I/O thread takes only a few requests, so most are retried. The host can neither discard nor zero
/// parts of the second COW file. Still, all flushed data must be in both.
fn retried_writes(_: &mut State) -> Result<String> {
    const SOCKET_BUFFER_SIZE: &str = "/proc/sys/net/core/wmem_default";
    let ramfs = format!("{ROOM}/ramfs");
    fs::create_dir_all(&ramfs)?;
    mount("ramfs", ramfs.as_str(), "ramfs", MountFlags::empty(), None)?;
    host::chmod(&ramfs, 0o777)?;
    // For each: the COW file, the image, and the image's size.
    let disks = [
        (
            "/var/spread.cow".to_owned(),
            format!("{ROOM}/empty1"),
            64 << 20,
        ),
        (
            format!("{ramfs}/spread.cow"),
            format!("{ROOM}/empty2"),
            8 << 20,
        ),
    ];
    let mut setup = on(1, Backing::Anon).with(&[FASTER]);
    for (number, (cow, image, size)) in (1..).zip(&disks) {
        let _ = fs::remove_file(cow);
        File::create(image)?.set_len(*size)?;
        setup = setup.with(&[&format!("ubd{number}={cow},{image}")]);
    }
    let before = fs::read_to_string(SOCKET_BUFFER_SIZE)?;
    fs::write(SOCKET_BUFFER_SIZE, "4608")?;
    let guest = start(setup);
    fs::write(SOCKET_BUFFER_SIZE, before)?;
    let mut guest = guest?;
    guest.run("disk", "spread")?;
    guest.kill(Signal::KILL)?;
    guest.wait(&[128 + 9])?;
    let (mut page, mut right, mut wrong) = ([0; 4096], 0, Vec::new());
    for (cow, image, size) in &disks {
        let disk = File::open(merge_cow(cow, image)?)?;
        for at in (0..*size).step_by(128 << 10) {
            disk.read_exact_at(&mut page, at)?;
            let wanted = (at / 4096 + 1).to_le_bytes();
            if page.chunks(8).all(|word| word == wanted) {
                right += 1;
            } else {
                wrong.push(format!("{cow}: {at:#x}"));
            }
        }
        fs::remove_file(cow)?;
    }
    ensure!(wrong.is_empty(), "missing: {}", wrong.join(", "));
    check_disk(&guest, true)?;
    Ok(format!("{right} pages"))
}

/// Traces on the host which files UML flushes by fdatasync(2).
fn flush(_: &mut State) -> Result<String> {
    mount("tracing", TRACING, "tracefs", MountFlags::empty(), None).context(TRACING)?;
    let mut guest = start(on(1, Backing::Anon).with(&["ubd=mmap", FASTER]))?;
    let switch = format!("{TRACING}/events/syscalls/sys_enter_fdatasync/enable");
    fs::write(&switch, "1").context(switch.clone())?;
    fs::write(format!("{TRACING}/trace"), "")?;
    guest.say(
        "dd if=/dev/zero of=/var/tmp/file bs=4k count=1 conv=fsync 2>/dev/null; echo; echo flushed",
    )?;
    guest.expect("flushed")?;
    fs::write(&switch, "0")?;
    let trace = fs::read_to_string(format!("{TRACING}/trace"))?;
    let mut flushes = 0;
    for line in trace.lines().filter(|line| line.contains("sys_fdatasync(")) {
        let number = line
            .rsplit_once("fd: ")
            .and_then(|(_, rest)| rest.strip_suffix(')'));
        let number = i32::from_str_radix(number.context("no fd")?.trim_start_matches("0x"), 16)?;
        let file = fs::read_link(format!("/proc/{}/fd/{number}", guest.pid()))?;
        ensure!(
            file.to_string_lossy() == guest.cow_file(),
            "{file:?} was flushed"
        );
        flushes += 1;
    }
    ensure!(flushes > 0, "no fdatasync: {trace}");
    guest.power_off()?;
    check_disk(&guest, false)?;
    Ok(format!("{flushes} calls of fdatasync"))
}

/// All that the guest has reported as flushed is on the disk, all other files of the image are unchanged, and the
/// filesystem is clean after its journal has been replayed. The guest has only one process.
fn killed(state: &mut State) -> Result<String> {
    let times = match (state.here, state.long) {
        (true, true) => 100,
        (true, false) if state.more => 12,
        (true, false) => 6,
        (false, _) => 3,
    };
    let mut flushed = 0;
    for time in 1..=times {
        let arguments = ["ubd=mmap", FASTER, "init=/usr/local/bin/disk", "--", "sync"];
        let setup = on(1, state.backing()).with(&arguments);
        let mut guest = setup.debian().size(256).start()?;
        guest.expect("disk: synced ")?;
        // Not right before the kill: the request would determine its moment.
        let counters = Counters::read(&guest)?;
        counters.check_nonzero(&["mapped", "promoted_write"])?;
        counters.check_no_errors()?;
        guest.check_kernel()?;
        let mut random = [0; 2];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        thread::sleep(Duration::from_millis(
            u64::from(u16::from_ne_bytes(random)) / 16,
        ));
        guest.kill(Signal::KILL)?;
        guest.wait(&[128 + 9])?;
        let count: usize = guest.last_line("disk: synced ")?.parse()?;
        check_disk(&guest, true)?;
        check_flushed(&format!("{ROOM}/merged"), count)?;
        eprintln!("killed {time} of {times} times: {count} changes flushed");
        flushed += count;
    }
    Ok(format!(
        "killed {times} times; {flushed} changes were flushed"
    ))
}

fn unchanged(state: &mut State) -> Result<String> {
    ensure!(checksum(IMAGE)? == state.sum, "{IMAGE} has changed");
    Ok(String::new())
}

/// Checks the image's files on this disk, `count` of them as changed by `disk sync`.
fn check_flushed(disk: &str, count: usize) -> Result<()> {
    let files = format!("{ROOM}/files");
    fs::create_dir(&files)?;
    let dump = format!("rdump / {files}");
    let (code, text) = output("debugfs", &["-R", &dump, disk])?;
    ensure!(code == 0, "debugfs: {text}");
    let result = check_files(&files, count);
    fs::remove_dir_all(&files)?;
    result
}

/// A change that was noted but not reported as flushed may be there or not.
fn check_files(root: &str, count: usize) -> Result<()> {
    let synced = format!("{root}/var/tmp/synced");
    let lines = fs::read_to_string(format!("{synced}/lines"))?;
    let found = lines.lines().take(count).map(str::parse).map(Result::ok);
    ensure!(found.eq((1..=count).map(Some)), "{count} lines:\n{lines}");

    let note = |number| fs::read_to_string(format!("{synced}/{number}"));
    let image = fs::read_to_string(format!("{root}/root/image.sha256"))?;
    let path = |line: &str| Some(line.split_once("  ")?.1.trim_end().to_owned());
    let mut sums: HashMap<_, _> = image.lines().map(|line| (path(line), line)).collect();
    let notes: Vec<_> = (1..=count).map(note).collect::<Result<_, _>>()?;
    for (line, number) in notes.iter().zip(1..) {
        ensure!(
            sums.insert(path(line), line.trim_end()).is_some(),
            "note {number} of {count} is not of a file of the image: {line}"
        );
    }
    for line in (count + 1..).map_while(|number| note(number).ok()) {
        sums.remove(&path(&line));
    }
    let list: Vec<_> = sums.into_values().collect();
    fs::write(format!("{root}/sums"), list.join("\n") + "\n")?;
    let check = format!("cd {root} && sha256sum -c sums | grep -v ': OK$'");
    let (code, text) = output("sh", &["-c", &check])?;
    // grep matched no line, and sha256sum printed no error.
    ensure!(code == 1 && text.is_empty(), "files of the image: {text}");
    Ok(())
}
