// SPDX-License-Identifier: GPL-2.0

//! Tests of `/dev/anon`. Run as root in a virtual machine: they load and unload the module, set up
//! swap, and write to sysfs.
//!
//! Every test runs in its own process, so a crash or a hang fails that test alone. The kernel's
//! taint flags are compared before and after each test.

mod doors;
mod faults;
mod hostile;
mod limits;
mod model;
mod pressure;
mod race;
mod rules;
mod sys;

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

/// Tests of /dev/anon: KTAP on stdout.
///
/// Needs root and a disposable machine: this program loads the module and sets up swap.
/// Exit status: 0 all passed (or skipped), 1 some failed, 2 wrong usage.
#[derive(Parser)]
#[command(name = "devanon-tests", version)]
struct Args {
    /// Run only these tests or groups (the part before `::`); all by default
    tests: Vec<String>,
    /// Skip this test or group; may be repeated
    #[arg(long, value_name = "TEST")]
    skip: Vec<String>,
    /// Print the names of the tests and exit
    #[arg(long)]
    list: bool,
    /// The kernel has patches/host: a node opened before the driver was loaded works afterwards
    #[arg(long)]
    node_works: bool,
    /// The driver was built with DEVANON_MMAP_PREPARE=y: adjacent mappings of the device merge
    #[arg(long)]
    merges: bool,
    /// Number of operations in the model test, and of calls in the random-call test
    #[arg(long, default_value_t = 20_000)]
    operations: u64,
    /// Random seed, to replay a run; random by default
    #[arg(long)]
    seed: Option<u64>,
    /// Duration in seconds of the race test, of the sustained opens (at most 60), and of the load
    /// and unload loop (at least 20)
    #[arg(long, default_value_t = 10)]
    race: u64,
    /// Run this one test in this process (internal: how the program runs each test)
    #[arg(long, hide = true, requires = "one_seed")]
    one: Option<String>,
    /// The seed for `--one`
    #[arg(long, hide = true)]
    one_seed: Option<u64>,
}

/// A test's name, and its function of the command line and a seed.
type Test = (&'static str, fn(&Args, u64) -> Result<()>);

/// Names each test after its function. In parentheses: the arguments to call that function with.
macro_rules! tests {
    ($($module:ident { $($name:ident $(($args:ident, $seed:ident: $($with:expr),*))?,)* })*) => {
        &[$($((
            concat!(stringify!($module), "::", stringify!($name)),
            tests!(@run $module $name $(($args, $seed: $($with),*))?),
        ),)*)*]
    };
    (@run $module:ident $name:ident) => { |_, _| $module::$name() };
    (@run $module:ident $name:ident ($args:ident, $seed:ident: $($with:expr),*)) => {
        |$args, $seed| $module::$name($($with),*)
    };
}

const TESTS: &[Test] = tests! {
    doors {
        node_from_devtmpfs,
        node_by_hand,
        mem_devices_still_work,
        historic_guest,
        offsets_up_to_the_limit,
        no_read_no_write_no_seek,
        read_only_open,
        userfaultfd_is_refused,
        fdinfo_and_maps,
        ioctl_file_is_a_file,
        concurrent_first_mappings,
        ioctl_file_frees_on_unmap,
        ioctl_file_keeps_what_was_never_mapped,
        ioctl_file_outlives_the_device_file,
        ioctl_file_ends_at_its_size,
        ioctl_wrong_use,
        ioctl_cloexec,
        ioctl_file_is_not_executable,
        out_of_descriptors,
        vmas_merge_as_with_memfd(args, _seed: args.merges),
        reopened_file_keeps_the_rule,
        mapping_opened_through_map_files,
        unprivileged_user,
        example_program,
        unit_tests,
        module_parameter_mode,
        second_load_is_refused,
        unload_is_refused_while_in_use,
        o_path_outlives_the_module,
        node_opened_too_early(args, _seed: args.node_works),
    }
    rules {
        munmap_whole,
        munmap_head_and_tail,
        munmap_hole_in_the_middle,
        munmap_one_by_one,
        map_fixed_over_by_a_file,
        map_fixed_over_by_anonymous_memory,
        map_fixed_over_by_the_same_pages,
        mremap_moves,
        mremap_grows_and_shrinks,
        mremap_over_a_mapping,
        mremap_makes_a_second_mapping,
        mremap_moves_several_at_once,
        fork_child_unmaps,
        fork_parent_unmaps,
        exit_with_many_mappings,
        covered_but_not_touched,
        several_mappings_in_one_process,
        inaccessible_mapping_keeps_pages,
        exit_frees,
        sigkill_frees,
        exec_frees,
        closing_the_device_frees_nothing_mapped,
        private_mappings,
        executable_pages,
        mlocked_pages,
        swapped_out_pages,
        madvise_keeps_what_is_mapped,
        madvise_remove_frees,
        madvise_dontfork,
        huge_pages_partly_unmapped,
        large_mappings_are_aligned,
        huge_pages_only_where_covered,
        huge_page_written_and_partly_mapped,
        collapsed_pages,
        charged_to_whoever_touches,
        pinned_pages,
        pinned_huge_page_partly_unmapped,
        huge_page_pinned_for_a_while,
        larger_than_dev_shm,
        one_open_never_sees_another,
        shared_by_dup_fork_and_scm_rights,
        many_untouched_mappings_close_quickly,
    }
    race {
        collapse,
        collapse_during_unmap,
        fault_during_swap_freeing,
        map_touch_unmap(args, seed: seed, args.race),
    }
    model {
        random_operations(args, seed: seed, args.operations),
    }
    // Each allocation fails in turn.
    faults {
        open_and_ioctl,
        mmap,
        touch,
        munmap,
        munmap_of_huge_pages,
        munmap_after_close,
        mremap,
        mprotect,
        fork_process,
        exit,
        insmod_and_rmmod,
        load_and_unload_a_thousand_times(args, _seed: args.race),
    }
    // Memory is short, or it moves.
    pressure {
        only_the_offender_is_killed(_args, seed: seed),
        killed_while_others_unmap(_args, seed: seed),
        unkillable_at_its_limit,
        four_times_the_memory,
        huge_pages_of_each_size,
        huge_pages_freed_in_swap,
        khugepaged_and_compaction(_args, seed: seed),
        pages_move_between_nodes(_args, seed: seed),
        cpu_hotplug(_args, seed: seed),
    }
    // Large numbers, and resource limits.
    limits {
        many_objects_of_many_processes,
        many_mappings_of_one_process,
        sustained_opens(args, _seed: args.race),
        descriptors_of_a_process,
        files_of_the_machine,
        address_space,
        mappings_of_a_process,
        locked_memory,
        size_of_files,
        overcommit_of_mappings,
        overcommit_of_pages,
    }
    // A malicious user.
    hostile {
        random_calls(args, seed: seed, args.operations),
        ioctl_numbers(_args, seed: seed),
        ioctl_numbers_of_32_bit_programs(_args, seed: seed),
        closed_to_other_users,
        pages_in_a_pipe,
        io_uring_reads_after_an_unmap,
        process_vm_writev_against_unmap,
        ptrace_pokes,
    }
};

/// Flags of `/proc/sys/kernel/tainted` that loading the module sets: out of tree, unsigned, and
/// in-kernel test (KUnit).
const MODULE_TAINT: u64 = (1 << 12) | (1 << 13) | (1 << 18);

fn taint() -> Result<u64> {
    Ok(fs::read_to_string("/proc/sys/kernel/tainted")?
        .trim()
        .parse::<u64>()?
        & !MODULE_TAINT)
}

fn busybox(args: &[&str]) -> Result<()> {
    let status = Command::new("/bin/busybox")
        .args(args)
        .stdout(Stdio::null())
        .status()?;
    if !status.success() {
        bail!("busybox {}: {status}", args.join(" "));
    }
    Ok(())
}

/// Loads the module, and sets up swap on zram. Either driver may be built into the kernel.
fn set_up() -> Result<()> {
    if !Path::new("/sys/class/devanon").exists() {
        sys::load(doors::MODULE, "").context(doors::MODULE)?;
    }
    if fs::read_to_string("/proc/swaps")?.lines().count() < 2 {
        if !Path::new("/sys/block/zram0").exists() {
            busybox(&["modprobe", "zram"])?;
        }
        fs::write("/sys/block/zram0/disksize", "256M")?;
        busybox(&["mkswap", "/dev/zram0"])?;
        busybox(&["swapon", "/dev/zram0"])?;
    }
    Ok(())
}

/// Exit status of a test that cannot run here, as in the kernel's selftests.
const SKIPPED: u8 = 4;

enum Outcome {
    Passed,
    /// The test cannot run here; its last line of output says why.
    Skipped,
    Failed(String),
}

/// Runs one test in its own process, then kills all that it started. Returns the test's output and
/// outcome.
fn run(name: &str, seed: u64, limit: Duration) -> (String, Outcome) {
    let spawn = || -> Result<(Child, UnixStream)> {
        let (reader, writer) = UnixStream::pair()?;
        let writer = OwnedFd::from(writer);
        let child = Command::new(env::current_exe()?)
            .args(env::args_os().skip(1))
            .args(["--one", name, "--one-seed", &seed.to_string()])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()?;
        Ok((child, reader))
    };
    let (mut child, mut reader) = match spawn() {
        Ok(pair) => pair,
        Err(err) => return (String::new(), Outcome::Failed(format!("{err:#}"))),
    };
    let output = thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = reader.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });

    let start = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if start.elapsed() > limit => break None,
            _ => thread::sleep(Duration::from_millis(2)),
        }
    };
    // Processes the test left behind would hold the socket, objects and the module.
    // SAFETY: The process group is this test's, so ours to kill; it may be gone already.
    unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
    let _ = child.wait();
    let output = output.join().unwrap_or_default();
    let outcome = match status {
        Some(status) if status.success() => Outcome::Passed,
        Some(status) if status.code() == Some(SKIPPED.into()) => Outcome::Skipped,
        Some(status) => Outcome::Failed(match status.signal() {
            Some(signal) => format!("crashed: signal {signal}"),
            None => "failed".into(),
        }),
        None => Outcome::Failed(format!("still running after {} s", limit.as_secs())),
    };
    (output, outcome)
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.list {
        TESTS.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    if let Some(name) = &args.one {
        let Some((_, test)) = TESTS.iter().find(|(known, _)| known == name) else {
            eprintln!("no test {name}");
            return ExitCode::from(2);
        };
        return match test(&args, args.one_seed.unwrap_or(0)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(err) => {
                println!("{err:#}");
                ExitCode::from(if err.is::<sys::Skip>() { SKIPPED } else { 1 })
            }
        };
    }
    let matches = |word: &str, name: &str| {
        name == word
            || name
                .split_once("::")
                .is_some_and(|(group, _)| group == word)
    };
    if let Some(unknown) = args
        .tests
        .iter()
        .chain(&args.skip)
        .find(|word| !TESTS.iter().any(|(name, _)| matches(word, name)))
    {
        eprintln!("no test {unknown}; --list shows them");
        return ExitCode::from(2);
    }

    println!("KTAP version 1");
    if let Err(err) = set_up() {
        println!("Bail out! {err:#}");
        return ExitCode::FAILURE;
    }
    let chosen: Vec<_> = TESTS
        .iter()
        .filter(|(name, _)| {
            let named = |words: &[String]| words.iter().any(|word| matches(word, name));
            (args.tests.is_empty() || named(&args.tests)) && !named(&args.skip)
        })
        .collect();
    println!("1..{}", chosen.len());

    // Printed before anything can crash.
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    println!("# seed {seed}");
    // Generous: kernels with every detector enabled are slow.
    let limit = Duration::from_secs(300 + args.race * 2 + args.operations / 50);
    let mut failed = false;
    for (number, (name, _)) in (1..).zip(&chosen) {
        let before = taint();
        let start = Instant::now();
        let (output, outcome) = run(name, seed, limit);
        let seconds = start.elapsed().as_secs_f64();
        // Some tests change this setting.
        let _ = fs::write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "never");
        let outcome = match (outcome, before, taint()) {
            (outcome, Ok(before), Ok(after)) if before == after => outcome,
            (_, before, after) => {
                Outcome::Failed(format!("kernel taint changed: {before:x?} -> {after:x?}"))
            }
        };

        let output: Vec<_> = output.trim_end().lines().collect();
        for line in &output {
            println!("# {}", line.trim_start_matches("# "));
        }
        match outcome {
            Outcome::Passed => println!("ok {number} {name} # {seconds:.1} s"),
            Outcome::Skipped => {
                println!("ok {number} {name} # SKIP {}", output.last().unwrap_or(&""))
            }
            Outcome::Failed(why) => {
                failed = true;
                println!("# {why}");
                println!("not ok {number} {name}");
            }
        }
    }
    ExitCode::from(u8::from(failed))
}
