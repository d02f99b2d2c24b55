// SPDX-License-Identifier: GPL-2.0

//! Debian guests from one image, one after another, until the host swaps: as UML is today, on
//! /dev/anon, and with `ubd=mmap`. JSON lines for devanon-plot.

use std::collections::HashMap;
use std::collections::HashSet;
use std::fs;
use std::fs::File;
use std::hash::BuildHasher;
use std::hash::RandomState;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::process::Signal;
use serde_json::json;

use crate::guest::Guest;
use crate::guest::IMAGE;
use crate::host;
use crate::host::Backing;
use crate::host::Memory;
use crate::kernel::on;
use crate::kernel::prepare;
use crate::life::TODAY;
use crate::life::cost;
use crate::life::figure;
use crate::life::mib;

/// What each guest believes to have, in MiB.
const SIZE: u32 = 256;
/// So many guests are looked at in detail: in the short form, where they are all, and in the long one.
const FEW: [usize; 2] = [3, 8];
/// All that is free at the login prompt is reported after that, and what was written is on the disk.
const IDLE: Duration = Duration::from_secs(15);
/// No host here has room for more.
const MANY: usize = 60;
const PAGE: usize = 4096;

/// Of all ways. Guests boot faster, or it would take more than an hour; their memory is the same.
const MODE: &str = "seccomp=on";

/// A way to run guests.
struct Way {
    run: &'static str,
    title: &'static str,
    backing: Backing,
    arguments: &'static [&'static str],
}

const WAYS: [Way; 3] = [
    Way {
        run: "a",
        title: "today's UML on tmpfs",
        backing: Backing::File,
        arguments: TODAY,
    },
    Way {
        run: "b",
        title: "/dev/anon",
        backing: Backing::Anon,
        arguments: &[],
    },
    Way {
        run: "c",
        title: "/dev/anon and ubd=mmap",
        backing: Backing::Anon,
        arguments: &["ubd=mmap"],
    },
];

/// What came of a way, in KiB for a guest, with so many of them.
struct Outcome {
    few: usize,
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

/// Fields of one of /proc/PID's files, each as the sum over a guest's processes.
fn sums<const N: usize>(guest: &Guest, file: &str, names: [&str; N]) -> Result<[i64; N]> {
    let mut sums = [0; N];
    for pid in processes(guest)? {
        let text = match fs::read_to_string(format!("/proc/{pid}/{file}")) {
            Ok(text) => text,
            // It has just ended.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("{pid}/{file}")),
        };
        for (sum, name) in sums.iter_mut().zip(names) {
            // A process that is no more, but not yet waited for, has none.
            *sum += host::field(&text, name).unwrap_or(0);
        }
    }
    Ok(sums)
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
        const PRESENT: u64 = 1 << 63;
        let pid = guest.pid();
        let (mut copies, mut mapped) = (HashSet::new(), HashSet::new());
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
            let of_image = line.ends_with("/debian.img");
            if !of_image && !line.ends_with(" (deleted)") {
                continue;
            }
            let range = line.split(' ').next().and_then(|word| word.split_once('-'));
            let (start, end) = range.context("maps")?;
            let pages = u64::from_str_radix(start, 16)? / PAGE as u64
                ..u64::from_str_radix(end, 16)? / PAGE as u64;
            let mut page = [0; PAGE];
            for number in pages {
                let mut entry = [0; 8];
                pagemap.read_exact_at(&mut entry, number * 8)?;
                // What is not there must not be brought in by looking.
                if u64::from_ne_bytes(entry) & PRESENT == 0 {
                    continue;
                }
                memory.read_exact_at(&mut page, number * PAGE as u64)?;
                if let Some(&found) = self.pages.get(&self.hasher.hash_one(page)) {
                    if of_image {
                        mapped.insert(found);
                    } else {
                        copies.insert(found);
                    }
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
        let (mut pages, mut copies, mut mapped_by_none) = (0, 0, 0);
        for page in self.pages.values() {
            let has = |(copies, mapped): &&(HashSet<u64>, HashSet<u64>)| {
                copies.contains(page) || mapped.contains(page)
            };
            if held.iter().filter(has).count() == guests.len() {
                let mapped = held.iter().any(|(_, mapped)| mapped.contains(page));
                pages += 1;
                copies += held.iter().filter(|(own, _)| own.contains(page)).count();
                copies += usize::from(mapped);
                mapped_by_none += usize::from(!mapped);
            }
        }
        ensure!(pages > 0, "the guests have nothing of the image in common");
        for (what, pages) in [
            ("pages of the image that all guests have", pages),
            ("  of these, none of them maps", mapped_by_none),
        ] {
            figure(&format!("({}) {what}", way.run), pages as f64, "", None);
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
    let mapped = if way.arguments.contains(&"ubd=mmap") {
        let counters = console.proc("ubd_mmap")?;
        eprintln!("{counters}");
        let pages = counters
            .lines()
            .find_map(|line| line.strip_prefix("pages "));
        pages.context("pages")?.parse::<i64>()? * PAGE as i64 / 1024
    } else {
        0
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
    let few = FEW[usize::from(!short)];
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
        let number = guests.len() + 1;
        let setup = on(number, way.backing).with(way.arguments).with(&[MODE]);
        let mut guest = setup.debian().size(SIZE).start()?;
        guest.wait_up()?;
        if vmstat("pswpout")? > swapped {
            // The host swapped for this one.
            guests.push(guest);
            break Some(number - 1);
        }
        guests.push(guest);
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
        few,
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
        outcomes.push(try_way(way, &image, short)?);
    }
    let share = |kib: i64, of: i64| kib as f64 / of as f64;
    let today = &outcomes[0];
    for (way, outcome) in WAYS.iter().zip(&outcomes) {
        let what = |text: &str| format!("({}) {}: {text}", way.run, way.title);
        figure(
            &what("host memory a guest"),
            mib(outcome.memory),
            "MiB",
            None,
        );
        figure(
            &what("against (a)"),
            share(outcome.memory, today.memory),
            "",
            goal(way, 0.35),
        );
        figure(&what("PSS a guest"), mib(outcome.pss), "MiB", None);
        if let (Some(guests), Some(of_today)) = (outcome.guests, today.guests) {
            figure(
                &what("guests before the host swaps"),
                guests as f64,
                "",
                None,
            );
            figure(
                &what("for each of these, so many of (a)"),
                of_today as f64 / guests as f64,
                "",
                goal(way, 0.4),
            );
        }
        figure(
            &what(&format!(
                "copies of the image's pages, {} guests",
                outcome.few
            )),
            outcome.copies,
            "",
            goal(way, 1.0),
        );
    }
    Ok(())
}

/// What a fixed piece of work takes in instructions, each way. A boot goes in and out.
pub fn count() -> Result<()> {
    ensure!(prepare(), "the VM is not as it should be");
    let work = ["compile", "starts", "compile", "starts"];
    // The first guest also pays for what the host does once.
    cost(Backing::File, TODAY, &[])?;
    let mut today = None;
    for way in &WAYS {
        let arguments = [way.arguments, &[MODE]].concat();
        let boot = cost(way.backing, &arguments, &[])?;
        let all = cost(way.backing, &arguments, &work)?;
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
