// SPDX-License-Identifier: GPL-2.0

//! The kernel to boot: build/kernels/LINE.

use std::fs;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

/// One directory of build/kernels.
pub struct Kernel {
    pub directory: PathBuf,
    /// What `uname -r` prints on it.
    pub release: String,
}

impl Kernel {
    pub fn of_line(line: &str) -> Result<Self> {
        let directory = Path::new("build/kernels").join(line);
        let release = fs::read_to_string(directory.join("release"))
            .with_context(|| format!("no kernel of line {line} in {}", directory.display()))?;
        Ok(Kernel {
            directory,
            release: release.trim().to_owned(),
        })
    }

    /// The file to boot: an uncompressed kernel. Our own kernels have a vmlinux; a distro's is
    /// extracted from its vmlinuz.
    ///
    /// QEMU starts it at its PVH entry point, which saves an emulated machine more than two seconds
    /// of decompression. Only KASLR is lost, because the decompressor does that. A vmlinuz that is
    /// not compressed with zstd boots as it is. `scratch` is a directory that belongs to this run.
    pub fn image(&self, scratch: &Path) -> Result<PathBuf> {
        let plain = self.directory.join("vmlinux");
        if plain.exists() {
            return Ok(plain);
        }
        let packed = self.directory.join("vmlinuz");
        let image = Path::new("build/vm").join(format!("vmlinux-{}", self.release));
        let modified = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified());
        let made = modified(&packed).with_context(|| format!("no {}", packed.display()))?;
        if modified(&image).is_ok_and(|time| time >= made) {
            return Ok(image);
        }
        let data = fs::read(&packed)?;
        let Some(payload) = payload(&data) else {
            return Ok(packed);
        };
        // Another run may be doing the same, hence the rename.
        let new = scratch.join("vmlinux");
        let made = unpack(payload, &new).and_then(|()| Ok(fs::rename(&new, &image)?));
        if made.is_err() {
            let _ = fs::remove_file(&new);
        }
        made.context("cannot unpack the kernel")?;
        Ok(image)
    }
}

fn unpack(payload: &[u8], to: &Path) -> Result<()> {
    let mut zstd = Command::new("zstd")
        .args(["-d", "-q", "-c"])
        .stdin(Stdio::piped())
        .stdout(File::create(to)?)
        .spawn()
        .context("cannot run zstd")?;
    let written = zstd.stdin.take().expect("piped").write_all(payload);
    let status = zstd.wait()?;
    ensure!(status.success(), "zstd: {status}");
    Ok(written?)
}

/// Finds the zstd stream in a bzImage: see payload_offset and payload_length in the kernel's
/// Documentation/arch/x86/boot.rst.
fn payload(image: &[u8]) -> Option<&[u8]> {
    const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let sectors = usize::from(*image.get(0x1f1)?);
    let start = (sectors + 1) * 512 + word(0x248)?;
    // The last four bytes are not part of the zstd stream: they hold the uncompressed size.
    let end = start + word(0x24c)?.checked_sub(4)?;
    let payload = image.get(start..end)?;
    payload.starts_with(ZSTD).then_some(payload)
}
