// SPDX-License-Identifier: GPL-2.0

//! How the cost of an unmap grows with the number of VMAs and processes.

use std::time::Duration;

use anyhow::Result;

use crate::Bench;
use crate::Cost;
use crate::Scale;
use crate::Setting;
use crate::child::Child;
use crate::memory::Map;
use crate::memory::Memory;
use crate::memory::Subject;
use crate::memory::Subject::*;
use crate::memory::expect;
use crate::timed;

/// Number of unmaps, each measured by itself.
const UNMAPS: usize = 64;
const MAX_MAPS: &str = "/proc/sys/vm/max_map_count";

/// The time it takes to read the clock.
fn clock() -> Result<Duration> {
    let (time, ()) = timed(|| {
        for _ in 0..1000 {
            timed(|| Ok(()))?;
        }
        Ok(())
    })?;
    Ok(time / 1000)
}

/// The median of many unmaps, each timed by itself: a timer tick may take as long as an unmap.
fn median(mut unmap: impl FnMut(usize) -> Result<Duration>) -> Result<Cost> {
    let clock = clock()?;
    let times: Result<Vec<Duration>> = (0..UNMAPS).map(&mut unmap).collect();
    let mut times = times?;
    times.sort();
    Ok(Cost::time(times[UNMAPS / 2].saturating_sub(clock), 1))
}

/// One process has `vmas` VMAs of one object, of a page each. Between them in the file, it repeatedly
/// maps, touches, unmaps and frees a page.
fn unmap_amid_vmas(subject: Subject, vmas: usize) -> Result<Cost> {
    let _maps = Setting::set(MAX_MAPS, "1000000")?;
    let memory = Memory::new(subject, 2 * vmas)?;
    let room = Map::reserve(vmas)?;
    room.unmap()?;
    for (vma, there) in room.pieces(1) {
        memory.map_over(there, 2 * vma)?;
    }
    expect("VMAs", room.vmas()?, vmas)?;
    let before = subject.resident()?;
    let cost = median(|number| {
        // Spread over the file, so that each page has neighbours on both sides.
        let page = 2 * (number * vmas / UNMAPS) + 1;
        let map = memory.map_anywhere(page, 1)?;
        map.write_all();
        Ok(timed(|| memory.give_back(map, page))?.0)
    })?;
    expect("pages", subject.resident()?, before)?;
    room.unmap()?;
    Ok(cost)
}

/// `others` processes map the same pages. This one unmaps a page at a time, which stays.
fn unmap_amid_processes(subject: Subject, others: usize) -> Result<Cost> {
    let before = subject.resident()?;
    let memory = Memory::new(subject, UNMAPS)?;
    let map = memory.map(0, UNMAPS)?;
    map.write_all();
    let mut children = Vec::new();
    for _ in 0..others {
        children.push(Child::start(|| Ok(()), |()| Ok(()))?);
    }
    let cost = median(|page| Ok(timed(|| Ok(map.part(page, 1).unmap()?))?.0))?;
    expect("pages", subject.resident()? - before, UNMAPS)?;
    for mut child in children {
        child.go()?;
        child.wait()?;
    }
    Ok(cost)
}

pub fn benches(scale: Scale) -> Vec<Bench> {
    const SUBJECTS: &[Subject] = &[Device, Ioctl, Memfd];
    let mut benches = Vec::new();
    for vmas in scale.up_to(&[10, 100, 1000, 10_000, 100_000]) {
        benches.push(
            Bench::new(
                "unmap and free a page, by VMAs of the object",
                "a page that is alone in its VMA",
                SUBJECTS,
                move |s| unmap_amid_vmas(s, vmas),
            )
            .at(vmas)
            .rounds(if vmas > 1000 { 1 } else { 4 }),
        );
    }
    for others in scale.up_to(&[1, 8, 64, 512]) {
        benches.push(
            Bench::new(
                "unmap a page, by other processes that map it",
                "a page unmapped that stays",
                SUBJECTS,
                move |s| unmap_amid_processes(s, others),
            )
            .at(others)
            .rounds(if others > 64 { 1 } else { 4 }),
        );
    }
    benches
}
