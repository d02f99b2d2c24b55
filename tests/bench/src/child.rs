// SPDX-License-Identifier: GPL-2.0

//! Child processes that get ready, and start working when told to.

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

/// A child that is ready, and waits to be told.
pub struct Child {
    pid: Pid,
    go: Option<File>,
}

impl Child {
    /// Forks. The child runs `ready`, then, once told to, `work`, and exits without dropping anything.
    /// Returns when the child is ready. This process must be single-threaded.
    pub fn start<T>(
        ready: impl FnOnce() -> Result<T>,
        work: impl FnOnce(T) -> Result<()>,
    ) -> Result<Self> {
        let (go_reader, go) = pipe()?;
        let (ready_reader, ready_writer) = pipe()?;
        // SAFETY: this process is single-threaded, so the child may call anything.
        let pid = match unsafe { libc::fork() } {
            -1 => return Err(std::io::Error::last_os_error()).context("fork"),
            0 => {
                drop((go, ready_reader));
                let body = panic::AssertUnwindSafe(|| -> Result<()> {
                    let state = ready()?;
                    File::from(ready_writer).write_all(b"r")?;
                    let mut byte = [0];
                    File::from(go_reader).read_exact(&mut byte)?;
                    work(state)
                });
                let code = match panic::catch_unwind(body) {
                    Ok(Ok(())) => 0,
                    Ok(Err(error)) => {
                        eprintln!("devanon-bench: child: {error:#}");
                        1
                    }
                    Err(_) => 1,
                };
                // SAFETY: ends the child, without the parent's exit handlers.
                unsafe { libc::_exit(code) }
            }
            pid => Pid::from_raw(pid).context("no pid")?,
        };
        drop((go_reader, ready_writer));
        let child = Self {
            pid,
            go: Some(File::from(go)),
        };
        let mut byte = [0];
        let ready = File::from(ready_reader).read_exact(&mut byte);
        ready.context("a child did not get ready")?;
        Ok(child)
    }

    /// Tells the child to start working.
    pub fn go(&mut self) -> Result<()> {
        let mut go = self.go.take().context("told already")?;
        Ok(go.write_all(b"g")?)
    }

    /// Waits for the child to exit. Its status must be 0.
    pub fn wait(self) -> Result<()> {
        let (_, status) = waitpid(Some(self.pid), WaitOptions::empty())?.context("no child")?;
        ensure!(status.exit_status() == Some(0), "child: {status:?}");
        Ok(())
    }
}
