// SPDX-License-Identifier: GPL-2.0

//! `ubd=mmap`: pages of a disk's image, mapped in place of the guest's memory. Files are right whatever
//! is done to them, the image is never written to, and the filesystem in the COW file is clean.

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
use crate::kernel::make_room;
use crate::kernel::on;
use crate::kernel::prepare;
use crate::kernel::wait_excess;
use crate::ktap;
use crate::ktap::Place;
use crate::ktap::Test;
use crate::userland::plug_while_it_works;

const MAX_MAPS: &str = "/proc/sys/vm/max_map_count";
/// With an ending: the sources that the small guests have, on three filesystems.
const FILES: &str = "/lib/devanon/files";
const DISK: &str = "/var/disk";
/// Where the mode does not matter.
const FASTER: &str = "seccomp=on";
const TRACING: &str = "/sys/kernel/tracing";

struct State {
    /// Here everything for longer; in the VM all tests there are.
    long: bool,
    /// On the machine itself, where guests are many times as fast: on memfds, and nothing of the machine
    /// is changed.
    here: bool,
    /// Of the image, before any guest.
    sum: String,
}

impl State {
    /// What guests have their memory in.
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
            "guests at once from one image: all files are right, and their memory has no copies",
            together,
        ),
    ),
    (
        Place::Both,
        (
            "files are written to, seen by others, poked: ptrace",
            ptrace,
        ),
    ),
    (
        Place::Here,
        (
            "they are removed as well, and all that is mapped is compared: seccomp, two processors",
            two_processors,
        ),
    ),
    (Place::Vm, ("read-only ext4, EROFS and squashfs", read_only)),
    (
        Place::Vm,
        (
            "what cannot be mapped is read, and the guest says why",
            refused,
        ),
    ),
    (
        Place::Vm,
        ("few mappings on the host: the rest is read", few_mappings),
    ),
    (
        Place::Here,
        (
            "the host kills one process of the guest, traced or not: no other one ends",
            lost_process,
        ),
    ),
    (
        Place::Here,
        ("an image that becomes shorter: errors, no more", truncated),
    ),
    (
        Place::Here,
        (
            "without it nothing is mapped; pages that are changed in part are read right",
            partly,
        ),
    ),
    (
        Place::Here,
        (
            "a COW file on a full disk, with another image, cut, removed: what was there is right",
            cow_files,
        ),
    ),
    (
        Place::Vm,
        ("a flush in the guest is one on the host", flush),
    ),
    (
        Place::Vm,
        (
            "writes that cannot be done at once, or not as they are asked for, are not lost",
            tried_again,
        ),
    ),
    (
        Place::Here,
        ("SIGKILL loses nothing that was flushed", killed),
    ),
    (
        Place::Both,
        ("after all that, the image is as it was", unchanged),
    ),
];

pub fn run(long: bool, here: bool) -> bool {
    let sum = match checksum(IMAGE) {
        Ok(sum) => sum,
        Err(error) => {
            eprintln!("devanon-uml: {error:#}");
            return false;
        }
    };
    // In the VM the long form has all.
    let elsewhere = match (here, long) {
        (true, _) => Some(Place::Vm),
        (false, false) => Some(Place::Here),
        (false, true) => None,
    };
    let tests = ktap::choose(TESTS, elsewhere);
    let prepared = if here { make_room() } else { prepare() };
    prepared && ktap::run(&tests, &mut State { long, here, sum })
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

/// What /proc/ubd_mmap says.
pub struct Counters(pub String);

impl Counters {
    fn of(guest: &Guest) -> Result<Self> {
        Ok(Self(guest.mconsole()?.proc("ubd_mmap")?))
    }

    pub fn get(&self, name: &str) -> Result<i64> {
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
            .and_then(|rest| rest.split(' ').next()?.parse().ok())
            .with_context(|| format!("no {name} in: {}", self.0))
    }

    /// These must have happened.
    fn some(&self, names: &[&str]) -> Result<()> {
        for name in names {
            ensure!(self.get(name)? > 0, "no {name} in: {}", self.0);
        }
        Ok(())
    }

    /// These must have happened since then.
    fn more(&self, before: &Self, names: &[&str]) -> Result<()> {
        for name in names {
            ensure!(
                self.get(name)? > before.get(name)?,
                "no more {name} than before in: {}",
                self.0
            );
        }
        Ok(())
    }

    /// With `ubd=mmap,verify`.
    fn all_compared(&self) -> Result<()> {
        let (mapped, compared) = (self.get("mapped")?, self.get("compared")?);
        ensure!(mapped > 0 && compared >= mapped, "{}", self.0);
        Ok(())
    }

    /// Nothing went wrong.
    fn good(&self) -> Result<()> {
        self.none(&["lost", "refused_differs", "refused_host"])
    }

    /// These must not.
    fn none(&self, names: &[&str]) -> Result<()> {
        for name in names {
            ensure!(self.get(name)? == 0, "{name} in: {}", self.0);
        }
        Ok(())
    }

    fn summary(&self) -> Result<String> {
        Ok(format!(
            "{} pages mapped, {} now in {} pieces; promoted: {} by writes, {} by mappings, {} by I/O",
            self.get("mapped")?,
            self.get("pages")?,
            self.get("runs")?,
            self.get("promoted_write")?,
            self.get("promoted_pte")?,
            self.get("promoted_io")?
        ))
    }
}

/// What is on a disk of a guest that has ended: the image, and over it what the COW file has. As a
/// file of its own, at most one at a time.
fn merged(cow: &str, image: &str) -> Result<String> {
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
        "{size}, sectors of {sector}"
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

/// After a guest: the filesystem on its disk is clean. After a guest that was killed the journal has to
/// be replayed first.
fn clean(guest: &Guest, replay: bool) -> Result<()> {
    let disk = merged(&guest.cow(), IMAGE)?;
    if replay {
        let (code, text) = output("e2fsck", &["-E", "journal_only", "-y", &disk])?;
        ensure!(code <= 1, "e2fsck: {text}");
    }
    clean_disk(&disk)
}

fn clean_disk(disk: &str) -> Result<()> {
    let (code, text) = output("e2fsck", &["-fn", disk])?;
    ensure!(code == 0, "e2fsck: {text}");
    Ok(())
}

/// A shell, in a memory of 256 MiB.
fn start(setup: Setup) -> Result<Guest> {
    shell(setup.single().size(256).start()?)
}

/// In the VM without all that Debian starts, which takes most of the time of a test there.
fn in_debian(state: &State, setup: Setup) -> Setup {
    if state.here {
        setup.debian()
    } else {
        setup.single()
    }
}

fn shell(mut guest: Guest) -> Result<Guest> {
    guest.wait_up()?;
    guest.log_in()?;
    Ok(guest)
}

/// All of the mapped pages are in use in the guest, and next to none of them costs the host any of the
/// guest's memory.
fn shares(guest: &Guest) -> Result<Counters> {
    let counters = Counters::of(guest)?;
    let kib = counters.get("pages")? * 4;
    let excess = wait_excess(guest, -kib * 95 / 100)?;
    eprintln!(
        "{}: {kib} KiB mapped; the host pays {} KiB less than the guest uses",
        guest.name, -excess
    );
    Ok(counters)
}

/// The image is larger than any one's memory, and all but the first do not even have room for its files. In
/// the VM each guest checks a quarter of them, for which it has no room either.
fn together(state: &mut State) -> Result<String> {
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
        in_debian(state, setup).size(size).start()
    };
    let started: Result<Vec<_>> = (1..=number).map(start).collect();
    let mut guests = Vec::new();
    for guest in started? {
        guests.push(shell(guest)?);
    }
    for guest in &mut guests {
        guest.begin("work", words)?;
    }
    let mut text = String::new();
    for guest in &mut guests {
        guest.finish("work", words)?;
        let counters = shares(guest)?;
        counters.good()?;
        counters.none(&["refused_mappings"])?;
        counters.some(&["restored_freed", "refused_page"])?;
        let room = guest.size() / 4;
        let (pages, mapped) = (counters.get("pages")?, counters.get("mapped")?);
        ensure!(pages > room / 6 && mapped > least, "{}", counters.0);
        // Of files there is no more than that, but what was written, and tmpfs.
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
        clean(guest, false)?;
    }
    Ok(text)
}

/// What a word of tests/guest/disk must bring about.
fn effects(words: &str) -> &'static [&'static str] {
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

/// These words of tests/guest/disk, while a quarter of the memory goes and comes. Not with "cut": Linux's own UML
/// does not stop a process on another CPU for a page that moves, or is reclaimed, and is not an image's.
fn changes(setup: Setup, words: &'static [&'static str], verify: bool) -> Result<String> {
    let mut guest = shell(setup.size(256).start()?)?;
    let mut cycles = 0;
    let mut counters = Counters::of(&guest)?;
    for words in words {
        if words.starts_with("cut") {
            guest.run("disk", words)?;
        } else {
            let short = words.starts_with("press");
            cycles += plug_while_it_works(&mut guest, "disk", words, short)?;
        }
        let before = counters;
        counters = Counters::of(&guest)?;
        counters.more(&before, effects(words)).context(*words)?;
    }
    counters.good()?;
    if verify {
        counters.all_compared()?;
    }
    guest.power_off()?;
    clean(&guest, false)?;
    Ok(format!(
        "{}\na quarter taken and given back {cycles} times",
        counters.summary()?
    ))
}

const LONG: &[&str] = &[
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
const ALL: &[&str] = &[
    "cut 5",
    "write 10",
    "watch 5",
    "direct 5",
    "poke 5",
    "exec 10",
    "press 10",
    "node 1000000",
];
/// Those for which it matters how processes map.
const PROCESSES: &[&str] = &["write 5", "watch 5", "poke 3"];

fn words(state: &State, short: &'static [&'static str]) -> &'static [&'static str] {
    match (state.long, state.here) {
        (true, true) => LONG,
        (false, false) => short,
        _ => ALL,
    }
}

fn ptrace(state: &mut State) -> Result<String> {
    let setup = on(1, state.backing()).with(&["ubd=mmap"]);
    changes(in_debian(state, setup), words(state, PROCESSES), false)
}

fn two_processors(state: &mut State) -> Result<String> {
    let setup = on(1, state.backing()).with(&["ubd=mmap,verify", "seccomp=on", "ncpus=2"]);
    changes(in_debian(state, setup), words(state, ALL), true)
}

/// The same files on three filesystems. What squashfs unpacks cannot be mapped. On the host, two are on
/// ext4, the others on tmpfs; the one with a COW file gets a successor while the guest runs.
fn read_only(_: &mut State) -> Result<String> {
    host::disk("/dev/vda", DISK)?;
    let replaced = format!("{DISK}/files.ext4");
    fs::copy(format!("{FILES}.ext4"), &replaced)?;
    let kept = format!("{DISK}/kept");
    let _ = fs::remove_file(&kept);
    fs::hard_link(&replaced, &kept)?;
    let cow = "/var/files.cow";
    let _ = fs::remove_file(cow);
    // Of each: its filesystem, UML's option without the number, and the file that must not change.
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
    let successor = format!("{DISK}/successor");
    noise(&successor)?;
    fs::rename(&successor, &replaced)?;
    let mut text = String::new();
    for (letter, ((kind, ..), sum)) in ('b'..).zip(disks.iter().zip(&sums)) {
        let before = Counters::of(&guest)?.get("mapped")?;
        guest.work(&format!("read {letter} {kind}"))?;
        let counters = Counters::of(&guest)?;
        let mapped = counters.get("mapped")? - before;
        text += &format!("{kind}: {mapped} pages mapped\n");
        // The programs that check come from the first disk, after the first time from memory.
        ensure!(
            (mapped > 1000) == (*kind != "squashfs"),
            "{text}{}",
            counters.0
        );
        counters.good()?;
        counters.all_compared()?;
        guest.say(&format!("echo; sha256sum /dev/ubd{letter}"))?;
        let sum = sum.split(' ').next().context("no checksum")?;
        guest.expect(&format!("{sum} "))?;
    }
    // A process has pages of two disks at once.
    guest.say("mount -t ext4 -o ro /dev/ubde /mnt")?;
    guest.run("disk", "batch")?;
    guest.say("umount /mnt")?;
    // The first can be written to, and is right when it comes from the disk again.
    guest.say(
        "mount -t ext4 /dev/ubdb /mnt && cp -r /mnt/crates/core_arch /mnt/copy && umount /mnt && \
         mount -t ext4 /dev/ubdb /mnt && diff -r /mnt/crates/core_arch /mnt/copy && umount /mnt; \
         set -- $?; echo; echo copied with $1",
    )?;
    ensure!(guest.expect("copied with ")? == "0", "the copy differs");
    guest.power_off()?;
    clean_disk(&merged(cow, &disks[0].2)?)?;
    fs::remove_file(cow)?;
    for ((.., file), sum) in disks.iter().zip(&sums) {
        ensure!(&checksum(file)? == sum, "{file} has changed");
    }
    clean(&guest, false)?;
    Ok(text)
}

/// Lines of the guest's kernel log.
fn log(guest: &mut Guest, pattern: &str) -> Result<Vec<String>> {
    guest.lines(&format!("dmesg | grep -e '{pattern}' | sed 's/^.*] //'"))
}

/// A disk of noise for a guest.
fn noise(path: &str) -> Result<()> {
    let mut bytes = vec![0; 1 << 20];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    fs::write(path, &bytes)?;
    host::chmod(path, 0o666)
}

fn refused(_: &mut State) -> Result<String> {
    let writable = format!("{ROOM}/writable");
    noise(&writable)?;
    let noexec = format!("{ROOM}/noexec");
    fs::create_dir_all(&noexec)?;
    mount("noexec", noexec.as_str(), "tmpfs", MountFlags::NOEXEC, None)?;
    let forbidden = format!("{noexec}/forbidden");
    noise(&forbidden)?;
    let mut guest = start(on(1, Backing::Anon).with(&[
        "ubd=mmap",
        FASTER,
        &format!("ubd1={writable}"),
        &format!("ubd2r={forbidden}"),
    ]))?;
    let lines = log(&mut guest, "^.*ubd[a-z]: ")?;
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
    // Less than a page; pages that are not in the page cache; pages that were changed.
    guest.say(
        "dd if=/dev/ubda of=/dev/null bs=512 count=8 iflag=direct 2>/dev/null; \
         dd if=/dev/ubda of=/dev/null bs=64k count=8 iflag=direct 2>/dev/null; \
         echo changed >>/root/hello.c; sync; echo 3 >/proc/sys/vm/drop_caches; cat /root/hello.c >/dev/null; \
         echo; echo read",
    )?;
    guest.expect("read")?;
    let counters = Counters::of(&guest)?;
    counters.some(&["refused_partial", "refused_page", "refused_changed"])?;
    counters.good()?;
    counters.none(&["refused_mappings"])?;
    guest.power_off()?;
    clean(&guest, false)?;
    drop(guest);

    // Its mappings do not merge, so there is no saying how many there will be.
    let mut guest = start(on(2, Backing::Device).with(&["ubd=mmap", FASTER]))?;
    let lines = log(&mut guest, "ubda: ")?;
    ensure!(
        lines == ["ubda: read, not mapped: the host cannot do it, err = -95"],
        "{lines:?}"
    );
    let counters = Counters::of(&guest)?;
    counters.none(&["images", "mapped"])?;
    guest.power_off()?;
    clean(&guest, false)?;
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

/// Half of the files are read and some are changed. A process that needs more is killed, traced or not, and no
/// other one. Then many pages in the middle of pieces are changed: UML keeps to what it found when it
/// started, but the processes that map such pages need more than they are allowed here, so that the
/// limit is gone by then.
fn with_few_mappings(few: usize, before: &str) -> Result<String> {
    let mut guest = start(on(1, Backing::Anon).with(&["ubd=mmap", FASTER]))?;
    guest.work("image 2")?;
    let mut most = write_and_count(&mut guest, "write 5")?;
    guest.say("disk pieces; echo ended with $?")?;
    ensure!(guest.expect("ended with ")? == "139", "all of {few}");
    ensure!(
        !log(&mut guest, "UML ran out of memory on the host side")?.is_empty(),
        "no word of it"
    );
    guest.run("disk", "traced")?;
    fs::write(MAX_MAPS, before)?;
    most = most.max(write_and_count(&mut guest, "split")?);
    ensure!(most < few * 3 / 4, "{most} mappings of {few}");
    // UML knows of all but those of its own program and of vmalloc().
    let counters = Counters::of(&guest)?;
    let (mappings, runs) = (host::mappings(guest.pid())?.0, counters.get("runs")?);
    ensure!(
        (mappings as i64) < runs + few as i64 / 8,
        "{mappings} mappings, and UML counts {runs}"
    );
    counters.some(&["refused_mappings", "promoted_neighbor"])?;
    ensure!(counters.get("mapped")? > 1000, "{}", counters.0);
    // There are too many for more to be mapped, until UML has joined those that need not be.
    // What was written above is in root/files.
    guest.say(
        "echo 3 >/proc/sys/vm/drop_caches; cd /; \
         grep -v ' root/files/' /root/image.sha256 | sed -n 0~2p | sha256sum --quiet -c; set -- $?; echo; echo read with $1",
    )?;
    ensure!(guest.expect("read with ")? == "0", "files are wrong");
    let last = Counters::of(&guest)?;
    last.more(&counters, &["joined", "mapped"])?;
    last.good()?;
    guest.power_off()?;
    clean(&guest, false)?;
    Ok(format!(
        "at most {most} mappings, then {mappings}, of which UML counts {runs}, and {} were joined\n{}",
        last.get("joined")?,
        last.summary()?
    ))
}

/// The most mappings that UML had meanwhile.
fn write_and_count(guest: &mut Guest, words: &str) -> Result<usize> {
    let mut most = 0;
    guest.begin("disk", words)?;
    while !guest.is_done("disk", words)? {
        most = most.max(host::mappings(guest.pid())?.0);
        thread::sleep(Duration::from_millis(100));
    }
    Ok(most)
}

/// Of one with two threads, so that one of them waits for the other; and of one that is asleep and has
/// something to map when it wakes up, traced, and much of it, not traced.
fn lost_process(state: &mut State) -> Result<String> {
    let mut guest = start(on(1, state.backing()).with(&["ubd=mmap", "seccomp=on", "ncpus=2"]))?;
    guest.say("disk spin; echo ended with $?")?;
    guest.expect("disk: spinning")?;
    let busiest = host::busiest_child(guest.pid())?;
    lose(&mut guest, busiest, "Unexpectedly lost MM child")?;

    for (words, mode) in [("line", "seccomp=off"), ("apart", "seccomp=on")] {
        let mut guest = start(on(1, state.backing()).with(&["ubd=mmap", mode]))?;
        guest.say(&format!("disk {words}; echo ended with $?"))?;
        guest.expect("disk: waiting")?;
        thread::sleep(Duration::from_secs(3));
        // The one that was started last.
        let last = host::children(guest.pid())?.into_iter().max();
        lose(
            &mut guest,
            last.context("no process")?,
            "cannot run the stub",
        )?;
    }
    Ok(String::new())
}

/// The guest's log tells that it was found out in the way that is meant.
fn lose(guest: &mut Guest, process: i32, sentence: &str) -> Result<()> {
    kill_process(Pid::from_raw(process).context("no process")?, Signal::KILL)?;
    guest.say("")?;
    ensure!(guest.expect("ended with ")? == "139", "it goes on");
    ensure!(!log(guest, sentence)?.is_empty(), "no word of it");
    guest.work("compile")?;
    guest.power_off()?;
    clean(guest, false)
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
    // At the end of a page: of the one with the end in it, a part would be right.
    file.set_len(file.metadata()?.len() / 6 / 4096 * 4096)?;
    guest.say("")?;
    guest.finish("disk", "bus")?;
    // From memory, which is gone; and from the disk.
    guest.say("find /mnt -type f -exec cat {} + >/dev/null; echo; echo memory")?;
    guest.expect("memory")?;
    guest.run("disk", "lost")?;
    guest.say("echo 3 >/proc/sys/vm/drop_caches; find /mnt -type f -exec cat {} + >/dev/null 2>&1 || echo; echo failed")?;
    guest.expect("failed")?;
    let errors = log(&mut guest, "I/O error, dev ubdb")?.len();
    ensure!(errors > 0, "no error");
    let counters = Counters::of(&guest)?;
    counters.some(&["lost"])?;
    guest.work("compile")?;
    guest.power_off()?;
    clean(&guest, false)?;
    Ok(format!(
        "{} pages lost, {errors} errors",
        counters.get("lost")?
    ))
}

/// And without ubd=mmap there is nothing of it.
fn partly(state: &mut State) -> Result<String> {
    let backing = format!("{ROOM}/backing");
    noise(&backing)?;
    let cow = "/var/partly.cow";
    let _ = fs::remove_file(cow);
    let mut guest =
        start(on(1, state.backing()).with(&[FASTER, &format!("ubd1={cow},{backing}")]))?;
    guest.run("disk", "partly")?;
    ensure!(
        guest.mconsole()?.proc("ubd_mmap").is_err(),
        "/proc/ubd_mmap is there"
    );
    guest.power_off()?;
    fs::remove_file(cow)?;
    clean(&guest, false)?;
    Ok(String::new())
}

/// What the host has no room for is what it was, now and after a boot; and a COW file that cannot be opened as it is
/// to be is not opened at all.
fn cow_files(state: &mut State) -> Result<String> {
    const PAGES: u64 = 2048;
    // In sectors; and so many pages `disk full` writes at once.
    const SIZE: &str = "16384";
    const AT_ONCE: u64 = 16;
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
    let merged = fs::read(merged(&cow, &image)?)?;
    for (number, page) in (0..).zip(merged.chunks(4096)) {
        let (new, old) = (page == words(number + 1), page == words(!number));
        let right = match number {
            number if number < full || (full + AT_ONCE..full + 2 * AT_ONCE).contains(&number) => {
                new
            }
            number if number < full + AT_ONCE => new || old,
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
    let size = |guest: &mut Guest, name: &str| guest.lines(&format!("cat /sys/block/{name}/size"));
    ensure!(size(&mut guest, "ubdb")? == [SIZE], "another image's size");
    ensure!(
        guest.lines("ls -d /sys/block/ubdc 2>/dev/null")?.is_empty(),
        "a disk without all of its bitmap"
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
        // It looks for partitions first.
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
    ensure!(size(&mut guest, "ubdb")? == [SIZE], "a plain disk");
    let first = guest.lines("dd if=/dev/ubdb bs=8 count=1 2>/dev/null | od -An -td8")?;
    ensure!(first.len() == 1 && first[0].trim() == "1", "{first:?}");
    guest.power_off()?;
    clean(&guest, false)?;
    Ok(format!("no room for page {full}"))
}

/// The socket to the thread that writes takes a few requests only, so that most are tried again; and the host can
/// neither discard nor zero a part of the second COW file. What was flushed is in both all the same.
fn tried_again(_: &mut State) -> Result<String> {
    const ROOM_OF_SOCKETS: &str = "/proc/sys/net/core/wmem_default";
    let ramfs = format!("{ROOM}/ramfs");
    fs::create_dir_all(&ramfs)?;
    mount("ramfs", ramfs.as_str(), "ramfs", MountFlags::empty(), None)?;
    host::chmod(&ramfs, 0o777)?;
    // Of each: the COW file, the image, and how long that is.
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
    let before = fs::read_to_string(ROOM_OF_SOCKETS)?;
    fs::write(ROOM_OF_SOCKETS, "4608")?;
    let guest = start(setup);
    fs::write(ROOM_OF_SOCKETS, before)?;
    let mut guest = guest?;
    guest.run("disk", "spread")?;
    guest.kill(Signal::KILL)?;
    guest.wait(&[128 + 9])?;
    let (mut page, mut right, mut wrong) = ([0; 4096], 0, Vec::new());
    for (cow, image, size) in &disks {
        let disk = File::open(merged(cow, image)?)?;
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
    ensure!(wrong.is_empty(), "not there: {}", wrong.join(", "));
    clean(&guest, true)?;
    Ok(format!("{right} pages"))
}

/// Which files were flushed by fdatasync(2), by way of the host's tracing.
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
            file.to_string_lossy() == guest.cow(),
            "{file:?} was flushed"
        );
        flushes += 1;
    }
    ensure!(flushes > 0, "none: {trace}");
    guest.power_off()?;
    clean(&guest, false)?;
    Ok(format!("{flushes} calls of fdatasync"))
}

/// What the guest said it had flushed is on the disk, all other files of the image are as they were, and the
/// filesystem is clean, after its journal was replayed. The guest has only one process.
fn killed(state: &mut State) -> Result<String> {
    let times = match (state.here, state.long) {
        (true, true) => 100,
        (true, false) => 12,
        (false, _) => 3,
    };
    let mut flushed = 0;
    for time in 1..=times {
        let arguments = ["ubd=mmap", FASTER, "init=/usr/local/bin/disk", "--", "sync"];
        let setup = on(1, state.backing()).with(&arguments);
        let mut guest = setup.debian().size(256).start()?;
        guest.expect("disk: synced ")?;
        // Not right before it is killed: this would choose the moment.
        let counters = Counters::of(&guest)?;
        counters.some(&["mapped", "promoted_write"])?;
        counters.good()?;
        guest.content()?;
        let mut random = [0; 2];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        thread::sleep(Duration::from_millis(
            u64::from(u16::from_ne_bytes(random)) / 16,
        ));
        guest.kill(Signal::KILL)?;
        guest.wait(&[128 + 9])?;
        let count: usize = guest.last("disk: synced ")?.parse()?;
        clean(&guest, true)?;
        has_all(&format!("{ROOM}/merged"), count)?;
        eprintln!("killed {time} of {times} times: {count} flushed");
        flushed += count;
    }
    Ok(format!("{times} times; {flushed} were flushed"))
}

fn unchanged(state: &mut State) -> Result<String> {
    ensure!(checksum(IMAGE)? == state.sum, "{IMAGE} has changed");
    Ok(String::new())
}

/// On this disk are the image's files, so many of them as `disk sync` changed them.
fn has_all(disk: &str, count: usize) -> Result<()> {
    let files = format!("{ROOM}/files");
    fs::create_dir(&files)?;
    let dump = format!("rdump / {files}");
    let (code, text) = output("debugfs", &["-R", &dump, disk])?;
    ensure!(code == 0, "debugfs: {text}");
    let result = check_all(&files, count);
    fs::remove_dir_all(&files)?;
    result
}

/// What is noted for one that was not said to be flushed may be there, or not.
fn check_all(root: &str, count: usize) -> Result<()> {
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
            "of {count} notes, {number}: {line}"
        );
    }
    for line in (count + 1..).map_while(|number| note(number).ok()) {
        sums.remove(&path(&line));
    }
    let list: Vec<_> = sums.into_values().collect();
    fs::write(format!("{root}/sums"), list.join("\n") + "\n")?;
    let check = format!("cd {root} && sha256sum -c sums | grep -v ': OK$'");
    let (code, text) = output("sh", &["-c", &check])?;
    // grep has found nothing, and sha256sum has said nothing else.
    ensure!(code == 1 && text.is_empty(), "files of the image: {text}");
    Ok(())
}
