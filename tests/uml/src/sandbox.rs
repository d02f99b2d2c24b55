// SPDX-License-Identifier: GPL-2.0

//! Restrictions that a sandbox on the host may impose on UML. Each function runs in the child between fork and exec.

use std::io;

/// `DEVANON_IOC_NEW`
const IOCTL: u32 = 0x4008_da01;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const SECOND_ARGUMENT: u32 = 24;

const fn op(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

const REFUSE: libc::sock_filter = op(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32);
const ALLOW: libc::sock_filter = op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW);

fn install(filter: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program and does not write to it.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) != 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Denies DEVANON_IOC_NEW with EPERM.
pub fn no_ioctl() -> io::Result<()> {
    install(&[
        op(LOAD, 0, 0, NUMBER),
        op(EQUAL, 0, 3, libc::SYS_ioctl as u32),
        op(LOAD, 0, 0, SECOND_ARGUMENT),
        op(EQUAL, 0, 1, IOCTL),
        REFUSE,
        ALLOW,
    ])
}

/// Denies memfd_create() as well. UML then also puts the program for its processes in a temporary file.
pub fn no_memfd() -> io::Result<()> {
    install(&[
        op(LOAD, 0, 0, NUMBER),
        op(EQUAL, 0, 1, libc::SYS_memfd_create as u32),
        REFUSE,
        ALLOW,
    ])?;
    no_ioctl()
}

/// Limits the size of files to 1 MiB.
pub fn small_files() -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: 1 << 20,
        rlim_max: 1 << 20,
    };
    // SAFETY: `limit` is only read.
    match unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
