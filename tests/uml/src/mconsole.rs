// SPDX-License-Identifier: GPL-2.0

//! A guest's management console. A request is one datagram, an answer one or more.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

const MAGIC: u32 = 0xcafe_babe;
const VERSION: u32 = 2;
/// Size of the data in a request or answer, including the terminating NUL.
const DATA: usize = 512;

/// How long to wait for an answer. Unplugging may have to write pages back first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// The state of memory hot-plug, in KiB.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plugged {
    /// Memory moved by this request; 0 for a query.
    pub moved: i64,
    pub plugged: i64,
    pub unplugged: i64,
}

pub struct Console {
    socket: UnixDatagram,
    /// The address our socket is bound to, where the guest sends its answers.
    path: PathBuf,
}

impl Console {
    /// Opens the console of the guest with this directory (uml_dir/umid).
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join("client");
        let _ = fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).with_context(|| path.display().to_string())?;
        // The guest runs as another user.
        crate::host::chmod(path.to_str().context("not UTF-8")?, 0o666)?;
        socket
            .connect(directory.join("mconsole"))
            .context("mconsole")?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self { socket, path })
    }

    /// Sends a request and returns the answer, as Ok or Err. A guest that is low on memory may fail to allocate
    /// any for the request itself; then the request is repeated.
    pub fn ask(&self, command: &str) -> Result<Result<String, String>> {
        let end = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let answer = self.ask_once(command)?;
            let out_of_memory = matches!(&answer, Err(text) if text == "Out of memory");
            if !out_of_memory || Instant::now() > end {
                return Ok(answer);
            }
            eprintln!("\"{command}\": out of memory");
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn ask_once(&self, command: &str) -> Result<Result<String, String>> {
        ensure!(command.len() < DATA, "the request is too long");
        let mut request = Vec::new();
        for word in [MAGIC, VERSION, command.len() as u32] {
            request.extend(word.to_ne_bytes());
        }
        request.extend(command.as_bytes());
        request.resize(12 + DATA, 0);
        self.socket.send(&request).context("mconsole")?;

        let mut text = String::new();
        let mut success = true;
        loop {
            let mut answer = [0; 12 + DATA];
            let size = self
                .socket
                .recv(&mut answer)
                .with_context(|| format!("no answer to \"{command}\""))?;
            let word = |n: usize| {
                let bytes = answer[4 * n..][..4].try_into().expect("four bytes");
                u32::from_ne_bytes(bytes)
            };
            ensure!(size >= 12, "short answer to \"{command}\"");
            success &= word(0) == 0;
            let data = &answer[12..size];
            let end = data.iter().position(|&b| b == 0).unwrap_or(data.len());
            text += &String::from_utf8_lossy(&data[..end]);
            if word(1) == 0 {
                return Ok(if success { Ok(text) } else { Err(text) });
            }
        }
    }

    /// Reads a file of the guest's /proc.
    pub fn proc(&self, file: &str) -> Result<String> {
        match self.ask(&format!("proc {file}"))? {
            Ok(text) => Ok(text),
            Err(text) => bail!("proc {file}: {text}"),
        }
    }

    /// Plugs (positive) or unplugs (negative) `kib` KiB. Returns whether all of it was moved, and the new state.
    pub fn plug(&self, kib: i64) -> Result<(bool, Plugged)> {
        let answer = self.ask(&format!("config mem={kib:+}K"))?;
        Ok((
            answer.is_ok(),
            parse_plugged(&answer.unwrap_or_else(|e| e))?,
        ))
    }

    pub fn plugged(&self) -> Result<Plugged> {
        match self.ask("config mem")? {
            Ok(text) => parse_plugged(&text),
            Err(text) => bail!("config mem: {text}"),
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Reads `moved=8192K plugged=188416K unplugged=8192K`.
fn parse_plugged(text: &str) -> Result<Plugged> {
    let field = |name: &str| {
        text.split(' ')
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .and_then(|value| value.strip_suffix('K')?.parse().ok())
    };
    Ok(Plugged {
        moved: field("moved").unwrap_or(0),
        plugged: field("plugged").with_context(|| format!("no plugged=: {text}"))?,
        unplugged: field("unplugged").with_context(|| format!("no unplugged=: {text}"))?,
    })
}
