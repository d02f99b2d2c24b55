// SPDX-License-Identifier: GPL-2.0

//! Debian guests from one image, one after another, until the host swaps: as UML is today, on
//! /dev/anon, and with `ubd=mmap`. JSON lines for devanon-plot.

use std::collections::HashMap;
use std::collections::HashSet;
use std::fs;
use std::fs::File;
use std::hash::BuildHasher;
use std::hash::RandomState;
use std::io;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::io::Errno;
use rustix::process::Signal;
use serde_json::json;

use crate::guest::Guest;
use crate::guest::IMAGE;
use crate::guest::Setup;
use crate::host;
use crate::host::Backing;
use crate::host::Memory;
use crate::kernel::on;
use crate::kernel::prepare;
use crate::life::TODAY;
use crate::life::cost;
use crate::life::figure;
use crate::life::mib;
use crate::ubd::Counters;

/// What each guest believes to have, in MiB.
const SIZE: u32 = 256;
/// All that is free at the login prompt is reported after that, and what was written is on the disk.
const IDLE: Duration = Duration::from_secs(15);
/// No host here has room for more.
const MANY: usize = 60;
/// With so much memory available, in KiB, of which some is pages of the image that are mapped, the host does not swap for
/// two guests more.
const FOR_TWO: i64 = 160 << 10;
const PAGE: usize = 4096;

/// Of our UML. Guests boot faster, or it would take more than an hour; their memory is the same.
const MODE: &str = "seccomp=on";

/// A way to run guests.
struct Way {
    run: &'static str,
    title: &'static str,
    setup: fn(usize) -> Setup,
}

const WAYS: [Way; 3] = [
    Way {
        run: "a",
        title: "today's UML on tmpfs",
        setup: |number| on(number, Backing::File).with(TODAY).with(&[MODE]),
    },
    Way {
        run: "b",
        title: "/dev/anon",
        setup: |number| on(number, Backing::Anon).with(&[MODE]),
    },
    Way {
        run: "c",
        title: "/dev/anon and ubd=mmap",
        setup: |number| on(number, Backing::Anon).with(&[MODE, "ubd=mmap"]),
    },
];

/// So many guests are looked at in detail: one and some twos. In the short form they are all.
fn few(short: bool) -> usize {
    if short { 3 } else { 9 }
}

/// How many guests to start next, with `running` there. Two take less time together, but what is measured
/// is the first one, then what a `few` take, and whether the host swaps for a single one more.
fn at_once(running: usize) -> Result<usize> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let room = host::field(&meminfo, "MemAvailable")? > FOR_TWO;
    Ok(if room && running > 0 { 2 } else { 1 })
}

/// What came of a way, in KiB for a guest, with so many of them.
struct Outcome {
    memory: i64,
    pss: i64,
    copies: f64,
    /// None in the short form.
    guests: Option<usize>,
}

/// The image on a disk, with room for COW files, and swap on another one.
fn disks() -> Result<()> {
    let run = |program: &str, arguments: &[&str]| -> Result<()> {
        let status = Command::new(program).args(arguments).status();
        ensure!(
            status.context(program.to_owned())?.success(),
            "{program} {arguments:?}"
        );
        Ok(())
    };
    host::disk("/dev/vda", "/var")?;
    host::chmod("/var", 0o777)?;
    std::os::unix::fs::symlink("/var/debian.img", IMAGE).context(IMAGE)?;
    run("mkswap", &["/dev/vdb"])?;
    run("swapon", &["/dev/vdb"])
}

fn vmstat(name: &str) -> Result<i64> {
    let text = fs::read_to_string("/proc/vmstat")?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| name.to_owned())?.parse()?)
}

/// UML and the processes that are its guest's.
fn processes(guest: &Guest) -> Result<Vec<i32>> {
    let mut all = host::children(guest.pid())?;
    all.push(guest.pid());
    Ok(all)
}

/// Fields of one of /proc/PID's files, each as the sum over a guest's processes. Those that have ended
/// have none, whether they were waited for or not.
fn sums<const N: usize>(guest: &Guest, file: &str, names: [&str; N]) -> Result<[i64; N]> {
    let mut sums = [0; N];
    for pid in processes(guest)? {
        let text = match fs::read_to_string(format!("/proc/{pid}/{file}")) {
            Err(error) if is_gone(&error) => continue,
            text => text.with_context(|| format!("{pid}/{file}"))?,
        };
        if text.contains("\nState:") && !text.contains("\nVmSize:") {
            continue;
        }
        for (sum, name) in sums.iter_mut().zip(names) {
            *sum += host::field(&text, name).with_context(|| format!("{pid}/{file}"))?;
        }
    }
    Ok(sums)
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// A page that a process has mapped, of its guest's memory file or of the image.
struct Present {
    of_image: bool,
    /// Where, and its offset in the file; in pages.
    address: u64,
    offset: u64,
}

/// Those that are there: none must be brought in by looking.
fn present(pid: i32) -> Result<Vec<Present>> {
    const PRESENT: u64 = 1 << 63;
    let mut found = Vec::new();
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let of_image = line.ends_with("/debian.img");
        let of_memory = line.ends_with(" (deleted)") && !line.contains("/memfd:uml-userspace");
        if !of_image && !of_memory {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let (start, end) = words[0].split_once('-').context("maps")?;
        let pages = |word| -> Result<u64> { Ok(u64::from_str_radix(word, 16)? / PAGE as u64) };
        let (start, end, offset) = (pages(start)?, pages(end)?, pages(words[2])?);
        for address in start..end {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, address * 8)?;
            if u64::from_ne_bytes(entry) & PRESENT != 0 {
                found.push(Present {
                    of_image,
                    address,
                    offset: offset + (address - start),
                });
            }
        }
    }
    Ok(found)
}

/// Kinds of page frames, by bits of the guest's /proc/kpageflags: the first that has one of a frame's.
const KINDS: [(&str, u64); 8] = [
    ("free", 1 << 10),
    ("slab", 1 << 7),
    ("page tables", 1 << 26),
    ("anonymous", 1 << 12),
    ("page cache: tmpfs", 1 << 14),
    ("page cache: files, metadata", (1 << 5) | (1 << 3)),
    ("reserved: struct pages, memory taken at boot", 1 << 32),
    (
        "the kernel's other pages: stacks, vmalloc, buffers",
        u64::MAX,
    ),
];

/// Each page of the memory file, by what the guest has in it. For that somebody has to log in.
fn page_by_page(way: &Way, guest: &mut Guest) -> Result<()> {
    guest.log_in()?;
    // Lines that are equal come once, and a "*" for the others.
    let lines = guest.lines("od -A x -t x8 -w8 /proc/kpageflags")?;
    // What the login and this have freed is reported.
    thread::sleep(IDLE);
    let mut frames = HashSet::new();
    for pid in processes(guest)? {
        // Of one that has just ended there is nothing; the sum would tell.
        let Ok(pages) = present(pid) else {
            continue;
        };
        let of_memory = pages.into_iter().filter(|page| !page.of_image);
        frames.extend(of_memory.map(|page| page.offset));
    }
    let cost = guest.memory()?.cost;

    let mut kinds = Vec::new();
    for line in lines {
        let (at, flags) = line.split_once(' ').unwrap_or((&line, ""));
        let Ok(at) = usize::from_str_radix(at, 16) else {
            continue;
        };
        // The last one again for each that was left out. At the very end there is only where that is.
        let last = kinds.last().copied().unwrap_or(0);
        kinds.resize(at / 8, last);
        if !flags.is_empty() {
            let flags = u64::from_str_radix(flags.trim(), 16)?;
            let kind = KINDS.iter().position(|(_, bits)| flags & bits != 0);
            kinds.push(kind.unwrap_or(KINDS.len() - 1));
        }
    }
    let mut pages = [0; KINDS.len()];
    for &frame in &frames {
        let kind = kinds.get(frame as usize);
        pages[*kind.with_context(|| format!("no frame {frame:#x}"))?] += 1;
    }
    for ((kind, _), pages) in KINDS.iter().zip(pages) {
        let kib = pages * PAGE as i64 / 1024;
        figure(
            &format!("({}) pages: {kind}", way.run),
            mib(kib),
            "MiB",
            None,
        );
    }
    let found = frames.len() as i64 * PAGE as i64 / 1024;
    ensure!(
        (found - cost).abs() < 512,
        "{found} KiB were found in the memory file, which costs {cost} KiB"
    );
    Ok(())
}

/// Which pages of the image these are, by what is in them.
struct Image {
    hasher: RandomState,
    pages: HashMap<u64, u64>,
}

impl Image {
    fn read() -> Result<Self> {
        let image = File::open(IMAGE)?;
        let hasher = RandomState::new();
        let mut pages = HashMap::new();
        let mut page = [0; PAGE];
        for number in 0..image.metadata()?.len() / PAGE as u64 {
            image.read_exact_at(&mut page, number * PAGE as u64)?;
            if page != [0; PAGE] {
                pages.insert(hasher.hash_one(page), number);
            }
        }
        Ok(Self { hasher, pages })
    }

    /// What a guest has of it: as copies in its memory, and mapped.
    fn held(&self, guest: &Guest) -> Result<(HashSet<u64>, HashSet<u64>)> {
        let (mut copies, mut mapped) = (HashSet::new(), HashSet::new());
        let memory = File::open(format!("/proc/{}/mem", guest.pid()))?;
        let mut page = [0; PAGE];
        for at in present(guest.pid())? {
            // What UML itself may not read here is mapped a second time.
            if memory
                .read_exact_at(&mut page, at.address * PAGE as u64)
                .is_err()
            {
                continue;
            }
            if let Some(&found) = self.pages.get(&self.hasher.hash_one(page)) {
                if at.of_image {
                    mapped.insert(found);
                } else {
                    copies.insert(found);
                }
            }
        }
        Ok((copies, mapped))
    }

    /// How often the host has a page that all guests have, on average. Its own page cache counts if
    /// one of them maps the page from there. What all have and none maps is metadata, where `way` maps.
    fn copies(&self, way: &Way, guests: &[Guest]) -> Result<f64> {
        let held: Result<Vec<_>> = guests.iter().map(|guest| self.held(guest)).collect();
        let held = held?;
        let (mut pages, mut copies, mut mapped_by_none, mut of_mapped) = (0, 0, 0, 0);
        for page in self.pages.values() {
            let has = |(copies, mapped): &&(HashSet<u64>, HashSet<u64>)| {
                copies.contains(page) || mapped.contains(page)
            };
            if held.iter().filter(has).count() == guests.len() {
                let mapped = held.iter().any(|(_, mapped)| mapped.contains(page));
                pages += 1;
                let own = held.iter().filter(|(own, _)| own.contains(page)).count();
                copies += own + usize::from(mapped);
                if mapped {
                    of_mapped += own + 1;
                } else {
                    mapped_by_none += 1;
                }
            }
        }
        ensure!(pages > 0, "the guests have nothing of the image in common");
        for (what, pages) in [
            ("pages of the image that all guests have", pages),
            ("  of these, none of them maps", mapped_by_none),
        ] {
            figure(&format!("({}) {what}", way.run), pages as f64, "", None);
        }
        if mapped_by_none < pages {
            figure(
                &format!("({})   copies of each of the others", way.run),
                of_mapped as f64 / (pages - mapped_by_none) as f64,
                "",
                None,
            );
        }
        Ok(copies as f64 / pages as f64)
    }
}

/// Where the memory of a guest goes: what the guest says of it, and the host. In the order in which
/// docs/savings.md adds it up. `memory` is what a guest costs in all, in KiB.
fn breakdown(way: &Way, guest: &Guest, memory: i64) -> Result<()> {
    let console = guest.mconsole()?;
    let meminfo = console.proc("meminfo")?;
    let of = |name| host::field(&meminfo, name);
    let show = |what: &str, kib: i64| {
        figure(&format!("({}) {what}", way.run), mib(kib), "MiB", None);
    };
    let mapped = match console.proc("ubd_mmap") {
        Ok(text) => Counters(text).get("pages")? * PAGE as i64 / 1024,
        Err(_) => 0,
    };
    let used = of("MemTotal")? - of("MemFree")?;
    let kernel = [
        ("anonymous", of("AnonPages")?),
        ("slab", of("Slab")?),
        (
            "page tables and kernel stacks",
            of("PageTables")? + of("KernelStack")?,
        ),
        ("page cache: mapped from the image", mapped),
        ("page cache: metadata", of("Buffers")?),
        ("page cache: the rest", of("Cached")? - mapped),
    ];
    show("guest: not free", used);
    for (what, kib) in kernel {
        show(&format!("  {what}"), kib);
    }
    let known: i64 = kernel.iter().map(|(_, kib)| kib).sum();
    show("  other", used - known);
    let file = guest.memory()?.cost;
    show("host: the guest's memory file", file);
    show(
        "  beyond what is not free: struct pages, free pages that were touched",
        file - (used - mapped),
    );
    let [anonymous] = sums(guest, "smaps_rollup", ["Pss_Anon"])?;
    show("host: UML's own memory", anonymous);
    let [tables] = sums(guest, "status", ["VmPTE"])?;
    show("host: page tables", tables);
    show(
        "host: the rest: processes, mappings",
        memory - file - anonymous - tables,
    );
    figure(
        &format!("({}) host: processes of a guest", way.run),
        processes(guest)?.len() as f64,
        "",
        None,
    );
    Ok(())
}

fn try_way(way: &Way, image: &Image, short: bool) -> Result<Outcome> {
    let few = few(short);
    let title = way.title;
    println!(
        "{}",
        json!({"run": {"run": way.run, "title": format!("({}) {title}", way.run)}})
    );
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let before = Memory::now()?.free;
    let swapped = vmstat("pswpout")?;
    let sample = |guests: usize| -> Result<i64> {
        let free = Memory::now()?.free;
        let line = json!({"run": way.run, "guests": guests, "host_kib": (before - free).max(0)});
        println!("{}", json!({ "sample": line }));
        Ok(free)
    };
    sample(0)?;
    let mut guests = Vec::new();
    let (mut first, mut memory, mut pss, mut copies) = (0, 0, 0, 0.0);
    let running = loop {
        let alive = guests.len();
        let mut next = Vec::new();
        for number in alive + 1..=alive + at_once(alive)? {
            next.push((way.setup)(number).debian().size(SIZE).start()?);
        }
        for guest in &mut next {
            guest.wait_up()?;
        }
        guests.append(&mut next);
        if vmstat("pswpout")? > swapped {
            break Some(alive);
        }
        let number = guests.len();
        if number == 1 || number == few {
            thread::sleep(IDLE);
            rustix::fs::sync();
        }
        let free = sample(number)?;
        eprintln!("devanon-uml: {title}: {number} guests, {} KiB free", free);
        if number == 1 {
            // It also has the host read what is in the image.
            first = free;
        }
        if number == few {
            memory = (first - free) / (few as i64 - 1);
            for guest in &guests {
                pss += sums(guest, "smaps_rollup", ["Pss"])?[0] / few as i64;
            }
            copies = image.copies(way, &guests)?;
            breakdown(way, &guests[few - 1], memory)?;
            if short {
                break None;
            }
            if way.run == "c" {
                page_by_page(way, &mut guests[few - 1])?;
            }
        }
        ensure!(number < MANY, "{MANY} guests, and the host does not swap");
    };
    ensure!(
        memory > 0,
        "fewer than {few} guests before the host swapped"
    );
    if let Some(running) = running {
        let title = format!(
            "({}) {title}: {running} guests before the host swaps",
            way.run
        );
        println!("{}", json!({"run": {"run": way.run, "title": title}}));
    }
    for guest in &mut guests {
        guest.kill(Signal::KILL)?;
        guest.wait(&[128 + 9])?;
    }
    Ok(Outcome {
        memory,
        pss,
        copies,
        guests: running,
    })
}

fn goal(way: &Way, worst: f64) -> Option<f64> {
    (way.run == "c").then_some(worst)
}

pub fn run(short: bool) -> Result<()> {
    ensure!(prepare(), "the VM is not as it should be");
    disks()?;
    let image = Image::read()?;
    let mut outcomes = Vec::new();
    for way in &WAYS {
        outcomes.push((way, try_way(way, &image, short)?));
    }
    for (way, outcome) in &outcomes {
        let show = |text: &str, value: f64, unit: &str, worst: Option<f64>| {
            let name = format!("({}) {}: {text}", way.run, way.title);
            figure(&name, value, unit, worst.and_then(|worst| goal(way, worst)));
        };
        let few = few(short);
        show("host memory a guest", mib(outcome.memory), "MiB", None);
        // The first way is today's.
        let today = &outcomes[0].1;
        let share = outcome.memory as f64 / today.memory as f64;
        show("against (a)", share, "", Some(0.35));
        show("PSS a guest", mib(outcome.pss), "MiB", None);
        if let (Some(guests), Some(of_today)) = (outcome.guests, today.guests) {
            show("guests before the host swaps", guests as f64, "", None);
            show(
                "for each of these, so many of (a)",
                of_today as f64 / guests as f64,
                "",
                Some(0.4),
            );
        }
        show(
            &format!("copies of the image's pages, {few} guests"),
            outcome.copies,
            "",
            Some(1.0),
        );
    }
    Ok(())
}

/// What a fixed piece of work takes in instructions, each way. A boot goes in and out.
pub fn count() -> Result<()> {
    ensure!(prepare(), "the VM is not as it should be");
    let work = ["compile", "starts", "compile", "starts"];
    let mut ways = WAYS.iter().peekable();
    // The first guest also pays for what the host does once.
    cost((ways.peek().context("no way")?.setup)(1), &[])?;
    let mut today = None;
    for way in ways {
        let boot = cost((way.setup)(1), &[])?;
        let all = cost((way.setup)(1), &work)?;
        let (today_boot, today_work) = *today.get_or_insert((boot, all - boot));
        for (what, value, of, worst) in [
            ("boot", boot, today_boot, None),
            ("work", all - boot, today_work, goal(way, 1.03)),
        ] {
            figure(
                &format!(
                    "({}) {}: instructions of {what} against (a)",
                    way.run, way.title
                ),
                value / of,
                "",
                worst,
            );
        }
    }
    Ok(())
}
