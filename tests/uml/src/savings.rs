// SPDX-License-Identifier: GPL-2.0

//! Starts Debian guests from one image until the host swaps: with UML as it is today, on /dev/anon,
//! and with `ubd=mmap`. JSON lines for devanon-plot.

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
use crate::life::figure;
use crate::life::instructions_of;
use crate::life::mib;
use crate::ubd::Counters;

/// Memory size of each guest, in MiB.
const SIZE: u32 = 256;
/// Long enough after the login prompt for free pages to be reported and written data to reach the disk.
const IDLE: Duration = Duration::from_secs(15);
/// More than the host has room for.
const MAX_GUESTS: usize = 60;
/// With this much MemAvailable, in KiB, the host can start two more guests without swapping. It includes mapped
/// pages of the image.
const ROOM_FOR_TWO: i64 = 160 << 10;
const PAGE: usize = 4096;

/// Guests boot faster in this mode. Without it the run takes over an hour. Memory use is the same.
const MODE: &str = "seccomp=on";

/// A way to run guests that is compared with the others.
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

/// The number of guests that are examined in detail: an odd number, as after the first they start in pairs.
/// The short form starts no more.
fn examined(short: bool) -> usize {
    if short { 3 } else { 9 }
}

/// How many guests to start next. Two at once take less time. Guests are started singly to measure the first,
/// and near the limit, to find at which guest the host swaps.
fn batch_size(running: usize) -> Result<usize> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let room = host::field(&meminfo, "MemAvailable")? > ROOM_FOR_TWO;
    Ok(if room && running > 0 { 2 } else { 1 })
}

/// The results of one way. `memory` and `pss` are per guest, in KiB.
struct Outcome {
    memory: i64,
    pss: i64,
    copies: f64,
    /// How many guests run before the host swaps; None in the short form.
    guests: Option<usize>,
}

/// Mounts the disk that has the image and room for COW files, and enables swap on another disk.
fn prepare_disks() -> Result<()> {
    let run = |program: &str, arguments: &[&str]| -> Result<()> {
        let status = Command::new(program).args(arguments).status();
        ensure!(
            status.context(program.to_owned())?.success(),
            "{program} {arguments:?}"
        );
        Ok(())
    };
    host::mount_disk("/dev/vda", "/var")?;
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

/// UML and its guest's processes.
fn processes(guest: &Guest) -> Result<Vec<i32>> {
    let mut all = host::children(guest.pid())?;
    all.push(guest.pid());
    Ok(all)
}

/// Sums fields of a /proc/PID file over a guest's processes. Processes that have exited are
/// skipped, reaped or not.
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

/// A page of the guest's memory file or of the image that is present in a process's page tables.
struct PresentPage {
    of_image: bool,
    /// Address and offset in the file, in pages.
    address: u64,
    offset: u64,
}

/// Returns the present pages. Uses pagemap, so that looking does not fault pages in.
fn present_pages(pid: i32) -> Result<Vec<PresentPage>> {
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
                found.push(PresentPage {
                    of_image,
                    address,
                    offset: offset + (address - start),
                });
            }
        }
    }
    Ok(found)
}

/// Kinds of page frames, by bits in the guest's /proc/kpageflags. The first kind that shares a bit with the
/// frame applies.
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

/// Classifies each page of the memory file by what the guest uses it for. This requires a login.
fn page_by_page(way: &Way, guest: &mut Guest) -> Result<()> {
    guest.log_in()?;
    // od prints a "*" in place of repeated lines.
    let lines = guest.output_of("od -A x -t x8 -w8 /proc/kpageflags")?;
    // Wait until memory that the login and od have freed is reported.
    thread::sleep(IDLE);
    let mut frames = HashSet::new();
    for pid in processes(guest)? {
        // The process may have just exited. If that matters, the sum below does not match.
        let Ok(pages) = present_pages(pid) else {
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
        // Repeats the last kind for each line left out. The last line has only an offset.
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
        "found {found} KiB of the memory file, which costs {cost} KiB"
    );
    Ok(())
}

/// The pages of the image, by their content. Pages of zeros are left out.
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

    /// Returns the pages of the image that a guest has copied to its memory, and those that it has mapped.
    fn held(&self, guest: &Guest) -> Result<(HashSet<u64>, HashSet<u64>)> {
        let (mut copies, mut mapped) = (HashSet::new(), HashSet::new());
        let memory = File::open(format!("/proc/{}/mem", guest.pid()))?;
        let mut page = [0; PAGE];
        for at in present_pages(guest.pid())? {
            // Pages that UML maps without read access are mapped a second time.
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

    /// Returns the average number of copies on the host of a page that all guests have. The host's page
    /// cache counts as one if any guest maps the page. Pages that all guests have and none maps are
    /// metadata, if `way` maps pages at all.
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
        ensure!(pages > 0, "no page of the image is in all guests");
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

/// Breaks down the memory of a guest, as seen by the guest and by the host, in the order in which
/// docs/savings.md adds it up. `memory` is the total cost of a guest, in KiB.
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

fn measure(way: &Way, image: &Image, short: bool) -> Result<Outcome> {
    let few = examined(short);
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
        for number in alive + 1..=alive + batch_size(alive)? {
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
            // The first guest is not counted: it also makes the host read the image.
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
        ensure!(
            number < MAX_GUESTS,
            "the host does not swap with {MAX_GUESTS} guests"
        );
    };
    ensure!(memory > 0, "the host swapped with fewer than {few} guests");
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
    ensure!(prepare(), "cannot prepare the VM");
    prepare_disks()?;
    let image = Image::read()?;
    let mut outcomes = Vec::new();
    for way in &WAYS {
        outcomes.push((way, measure(way, &image, short)?));
    }
    for (way, outcome) in &outcomes {
        let show = |text: &str, value: f64, unit: &str, worst: Option<f64>| {
            let name = format!("({}) {}: {text}", way.run, way.title);
            figure(&name, value, unit, worst.and_then(|worst| goal(way, worst)));
        };
        let few = examined(short);
        show("host memory a guest", mib(outcome.memory), "MiB", None);
        // The first way is UML as it is today.
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

/// Counts the instructions of a boot, and of a fixed workload less the boot, each way.
pub fn count() -> Result<()> {
    ensure!(prepare(), "cannot prepare the VM");
    let work = ["compile", "starts", "compile", "starts"];
    let mut ways = WAYS.iter().peekable();
    // The first guest also pays for one-time work of the host.
    instructions_of((ways.peek().context("no way")?.setup)(1), &[])?;
    let mut today = None;
    for way in ways {
        let boot = instructions_of((way.setup)(1), &[])?;
        let all = instructions_of((way.setup)(1), &work)?;
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
