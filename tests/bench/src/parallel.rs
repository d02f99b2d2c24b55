// SPDX-License-Identifier: GPL-2.0

//! Two processes at once. They need two CPUs, so instructions cannot be counted.

use anyhow::Result;
use rustix::thread::CpuSet;
use rustix::thread::sched_setaffinity;

use crate::Bench;
use crate::Cost;
use crate::Scale;
use crate::child::Child;
use crate::memory::Memory;
use crate::memory::Subject;
use crate::memory::Subject::*;
use crate::memory::expect;
use crate::timed;

const PROCESSES: usize = 2;
/// Number of pages mapped, touched and freed at a time.
const PAGES: usize = 16;

/// Each process maps, touches and frees its own pages, of a common object or of its own one.
fn together(subject: Subject, turns: usize, one_object: bool) -> Result<Cost> {
    let before = subject.resident()?;
    let pages = PROCESSES * PAGES;
    let common = Memory::new(subject, pages)?;
    let mut children = Vec::new();
    for process in 0..PROCESSES {
        let ready = || {
            let mut cpu = CpuSet::new();
            cpu.set(process);
            sched_setaffinity(None, &cpu)?;
            Memory::new(subject, pages)
        };
        let work = |own: Memory| {
            let memory = if one_object { &common } else { &own };
            for _ in 0..turns {
                let map = memory.map(process * PAGES, PAGES)?;
                map.write_all();
                memory.give_back(map, process * PAGES)?;
            }
            Ok(())
        };
        children.push(Child::start(ready, work)?);
    }
    let (time, ()) = timed(|| {
        for child in &mut children {
            child.go()?;
        }
        for child in children.drain(..) {
            child.wait()?;
        }
        Ok(())
    })?;
    expect("pages", subject.resident()?, before)?;
    Ok(Cost::time(time, turns * PAGES * PROCESSES))
}

pub fn benches(scale: Scale) -> Vec<Bench> {
    const SUBJECTS: &[Subject] = &[Device, Ioctl, Memfd, Tmpfs, Private];
    const OPERATION: &str = "a page mapped, touched and freed, 16 at once; two processes";
    let turns = scale.of(2048);
    vec![
        Bench::new(
            "two processes, an object each",
            OPERATION,
            SUBJECTS,
            move |s| together(s, turns, false),
        ),
        Bench::new("two processes, one object", OPERATION, SUBJECTS, move |s| {
            together(s, turns, true)
        }),
    ]
}
