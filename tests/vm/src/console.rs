// SPDX-License-Identifier: GPL-2.0

//! Signs of kernel trouble on the console.
//!
//! Everything on the console counts, not only the kernel's own output: a test that writes one of
//! these patterns to its standard error has trouble as well.

/// The line that precedes a kernel report.
pub const CUT_HERE: &str = "[ cut here ]";

/// Each sign is a list of substrings that one line must contain, in any order.
///
/// Injected faults, failed allocations and OOM kills are not signs. A detector that has turned
/// itself off is a sign only if it says so on the console: devanon-init queries kmemleak and
/// lockdep directly.
const SIGNS: [&[&str]; 38] = [
    &[CUT_HERE],
    &["BUG:"],
    &["kernel BUG at"],
    &["WARNING:"],
    &["Oops"],
    &["Kernel panic"],
    &["general protection fault"],
    &["KASAN"],
    &["KCSAN"],
    &["KFENCE"],
    &["KMSAN"],
    &["UBSAN"],
    &["possible recursive locking"],
    &["circular locking"],
    &["inconsistent lock state"],
    &["suspicious RCU usage"],
    &["rcu", "detected", "stall"],
    &["kthread starved"],
    &["INFO: task"],
    &["soft lockup"],
    &["hard LOCKUP"],
    &["scheduling while atomic"],
    &["sleeping function called"],
    &["unreferenced object"],
    &["Bad page"],
    &["Bad rss-counter"],
    &["refcount_t"],
    &["still has locks held"],
    &["turning off the locking correctness validator"],
    &["lockdep is turned off"],
    &["suspected memory leaks"],
    &["BUG ", "ainted", "): "],
    &["list_", "corruption"],
    &["list_", " double add"],
    &["pagealloc: "],
    &[".c:", ": bad p"],
    &["Bad swap"],
    &["not ok "],
];

fn contains_all(line: &str, pieces: &[&str]) -> bool {
    pieces.iter().all(|piece| line.contains(piece))
}

/// Returns true if this line is a sign of kernel trouble.
fn is_trouble(line: &str) -> bool {
    // "traps: NAME[PID] general protection fault" is a crash of a user-space program.
    SIGNS.iter().any(|sign| contains_all(line, sign)) && !line.contains("traps: ")
}

/// Indices of the lines that are signs of kernel trouble.
pub fn trouble_lines(lines: &[&str]) -> Vec<usize> {
    (0..lines.len()).filter(|&n| is_trouble(lines[n])).collect()
}

/// The lines of a console log, without the serial console's carriage returns.
pub fn lines(log: &str) -> Vec<&str> {
    log.lines()
        .map(|line| line.trim_end_matches('\r'))
        .collect()
}

/// The last `count` lines.
pub fn tail<'a>(lines: &'a [&'a str], count: usize) -> &'a [&'a str] {
    &lines[lines.len().saturating_sub(count)..]
}

/// Taint flags set during the run, other than those of an out-of-tree (O), unsigned (E) module, as
/// the kernel's own letters.
pub fn new_taint(before: u64, after: u64) -> String {
    const LETTERS: &str = "PFSRMBUDAWCIOELKXTNJ";
    const EXPECTED: u64 = (1 << 12) | (1 << 13);
    let new = after & !before & !EXPECTED;
    (0..u64::BITS)
        .filter(|bit| new & (1 << bit) != 0)
        .map(|bit| LETTERS.chars().nth(bit as usize).unwrap_or('?'))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One real line for each sign, in the order of [`SIGNS`].
    const EXAMPLES: [&str; SIGNS.len()] = [
        "[    1.0] ------------[ cut here ]------------",
        "[    1.0] BUG: kernel NULL pointer dereference, address: 0000000000000000",
        "[    1.0] kernel BUG at mm/filemap.c:153!",
        "[    1.0] WARNING: CPU: 0 PID: 77 at mm/shmem.c:1301 shmem_evict_inode+0x2a/0x2c0",
        "[    1.0] Oops: 0002 [#1] PREEMPT SMP NOPTI",
        "[    1.0] Kernel panic - not syncing: sysrq triggered crash",
        "[    1.0] Oops: general protection fault, probably for non-canonical address 0xdead",
        "[    1.0] BUG: KASAN: slab-use-after-free in devanon_close+0x12/0x40 [devanon]",
        "[    1.0] BUG: KCSAN: data-race in a / b",
        "[    1.0] BUG: KFENCE: use-after-free read in a+0x1/0x2",
        "[    1.0] BUG: KMSAN: uninit-value in a+0x1/0x2",
        "[    1.0] UBSAN: array-index-out-of-bounds in mm/shmem.c:12:3",
        "[    1.0] WARNING: possible recursive locking detected",
        "[    1.0] WARNING: possible circular locking dependency detected",
        "[    1.0] WARNING: inconsistent lock state",
        "[    1.0] WARNING: suspicious RCU usage",
        "[    1.0] rcu: INFO: rcu_preempt self-detected stall on CPU",
        "[    1.0] rcu: rcu_preempt kthread starved for 5250 jiffies! g1 f0x0 RCU_GP_WAIT_FQS(5)",
        "[    1.0] INFO: task devanon-tests:77 blocked for more than 120 seconds.",
        "[    1.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [devanon-tests:77]",
        "[    1.0] NMI watchdog: Watchdog detected hard LOCKUP on cpu 0",
        "[    1.0] BUG: scheduling while atomic: devanon-tests/77/0x00000002",
        "[    1.0] BUG: sleeping function called from invalid context at mm/truncate.c:3",
        "unreferenced object 0xffff888003a5c000 (size 1024):",
        "[    1.0] BUG: Bad page state in process devanon-tests  pfn:12345",
        "[    1.0] BUG: Bad rss-counter state mm:000000007d9a4a2b type:MM_SHMEMPAGES val:1",
        "[    1.0] refcount_t: underflow; use-after-free.",
        "[    1.0] WARNING: devanon-tests/77 still has locks held!",
        "[    1.0] turning off the locking correctness validator.",
        "[    1.0] INFO: lockdep is turned off.",
        "[    1.0] kmemleak: 2 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
        "[    1.0] BUG kmalloc-64 (Tainted: G           O      ): Right Redzone overwritten",
        "[    1.0] list_del corruption, ffff888003a5c000->next is LIST_POISON1 (dead000000000100)",
        "[    1.0] list_add double add: new=ffff888003a5c000, prev=ffff8880, next=ffff8880.",
        "[    1.0] pagealloc: memory corruption",
        "[    1.0] mm/pgtable-generic.c:50: bad pmd 0000000045a9b4f7(8000000034c000e7)",
        "[    1.0] swap_dup: Bad swap file entry 3ffffffffff",
        "[    1.0]     not ok 3 the_closed_range_is_freed",
    ];

    #[test]
    fn every_sign_matches_its_example() {
        for (sign, line) in SIGNS.iter().zip(EXAMPLES) {
            assert!(contains_all(line, sign), "{sign:?} is not in {line:?}");
            assert!(is_trouble(line), "{line}");
        }
    }

    #[test]
    fn ordinary_lines_are_not_signs() {
        for line in [
            "[    0.1] rcu: Hierarchical RCU implementation.",
            "[    0.1] rcu: \tRCU CPU stall warnings timeout set to 60 (rcu_cpu_stall_timeout).",
            "[    0.1] devanon: loading out-of-tree module taints kernel.",
            "[    9.1] traps: a.out[80] general protection fault ip:401136 sp:7ffc error:0 in a.out",
            "[    0.1] kasan: KernelAddressSanitizer initialized (generic)",
            "[    0.1] kmemleak: Kernel memory leak detector initialized (mem pool available: 39531)",
            "[    0.1] Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar",
            "[    0.1]     ok 3 the_closed_range_is_freed",
            "[    9.1] FAULT_INJECTION: forcing a failure.",
            "[    9.1] name failslab, interval 1, probability 0, space 0, times 1",
            "[    9.1] CPU: 1 UID: 0 PID: 80 Comm: devanon-tests Tainted: G           O        7.3.4",
            "[    9.1] Call Trace:",
            "[    9.1] devanon-tests: page allocation failure: order:0, mode:0xcc0(GFP_KERNEL)",
            "[    9.1] warn_alloc: 1 callbacks suppressed",
            "[    9.1] SLUB: Unable to allocate memory on CPU 1 (of node 0) on node -1, gfp=0xcc0",
            "[    9.1] Mem-Info:",
            "[    9.1] devanon-tests invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0",
            "[    9.1] oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),task=devanon-tests,pid=80",
            "[    9.1] Memory cgroup out of memory: Killed process 80 (devanon-tests) total-vm:9kB",
            "[    9.1] oom_reaper: reaped process 80 (devanon-tests), now anon-rss:0kB",
            "[    0.1] Booting the kernel",
        ] {
            assert!(!is_trouble(line), "{line}");
        }
    }

    #[test]
    fn only_unexpected_new_taint_counts() {
        assert_eq!(new_taint(0, 0x3000), "");
        assert_eq!(new_taint(0x200, 0x3200), "");
        assert_eq!(new_taint(0, 0x3280), "DW");
    }
}
