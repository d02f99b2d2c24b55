// SPDX-License-Identifier: GPL-2.0

//! Child processes that do something when told to.

use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::panic;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::pipe::pipe;
use rustix::process::Pid;
use rustix::process::WaitOptions;
use rustix::process::waitpid;

/// A child that has got ready, and waits.
pub struct Child {
    pid: Pid,
    go: Option<File>,
}

impl Child {
    /// Forks. The child does `ready`, and once it is told to, `work`, and ends; nothing of it is
    /// dropped. Returns when it is ready. This process has one thread.
    pub fn start<T>(
        ready: impl FnOnce() -> Result<T>,
        work: impl FnOnce(T) -> Result<()>,
    ) -> Result<Self> {
        let (told, tell) = pipe()?;
        let (hear, say) = pipe()?;
        // SAFETY: there is one thread, so the child has all that this process has.
        let pid = match unsafe { libc::fork() } {
            -1 => return Err(std::io::Error::last_os_error()).context("fork"),
            0 => {
                drop((tell, hear));
                let life = panic::AssertUnwindSafe(|| -> Result<()> {
                    let state = ready()?;
                    File::from(say).write_all(b"r")?;
                    let mut word = [0];
                    File::from(told).read_exact(&mut word)?;
                    work(state)
                });
                let code = match panic::catch_unwind(life) {
                    Ok(Ok(())) => 0,
                    Ok(Err(error)) => {
                        eprintln!("devanon-bench: child: {error:#}");
                        1
                    }
                    Err(_) => 1,
                };
                // SAFETY: this ends the child, without what is done at the parent's exit.
                unsafe { libc::_exit(code) }
            }
            pid => Pid::from_raw(pid).context("no pid")?,
        };
        drop((told, say));
        let child = Self {
            pid,
            go: Some(File::from(tell)),
        };
        let mut word = [0];
        let ready = File::from(hear).read_exact(&mut word);
        ready.context("a child did not get ready")?;
        Ok(child)
    }

    pub fn go(&mut self) -> Result<()> {
        let mut go = self.go.take().context("told already")?;
        Ok(go.write_all(b"g")?)
    }

    /// Waits for its end, which must be a good one.
    pub fn wait(self) -> Result<()> {
        let (_, status) = waitpid(Some(self.pid), WaitOptions::empty())?.context("no child")?;
        ensure!(status.exit_status() == Some(0), "child: {status:?}");
        Ok(())
    }
}
