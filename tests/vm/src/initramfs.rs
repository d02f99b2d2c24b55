// SPDX-License-Identifier: GPL-2.0

//! Builds the VM's initramfs. It is not compressed: decompressing costs more than reading.

use std::collections::BTreeSet;
use std::collections::HashMap;
use std::fs;
use std::fs::File;
use std::io;
use std::io::BufWriter;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use cpio::newc;

/// "user" runs whatever needs no privilege.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n";
const GROUP: &str = "root:x:0:\nuser:x:1000:\n";

/// Kernel modules that programs in the VM can load: zram as a swap device, the others for disks and
/// for filesystem images.
const MODULES: [&str; 4] = ["zram", "virtio_blk", "loop", "ext4"];

/// An archive being written.
pub struct Archive {
    out: Option<BufWriter<File>>,
    /// Every path written so far: a directory must precede its files, and no path may be repeated.
    paths: BTreeSet<PathBuf>,
}

impl Archive {
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Archive {
            out: Some(BufWriter::new(file)),
            paths: BTreeSet::new(),
        })
    }

    fn entry(&mut self, path: &Path, mode: u32, data: &[u8]) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if let Some(parent) = path.parent() {
            if !parent.as_os_str().is_empty() && !self.paths.contains(parent) {
                self.entry(parent, 0o040755, &[])?;
            }
        }
        if !self.paths.insert(path.to_owned()) {
            bail!("/{} is added twice", path.display());
        }
        let name = path.to_str().context("a path is not UTF-8")?;
        let out = self.out.take().expect("put back below");
        let mut entry = newc::Builder::new(name)
            .ino(self.paths.len().try_into()?)
            .nlink(1)
            .mode(mode)
            .write(out, data.len().try_into()?);
        entry.write_all(data)?;
        self.out = Some(entry.finish()?);
        Ok(())
    }

    pub fn text(&mut self, path: &str, text: &str) -> Result<()> {
        self.entry(Path::new(path), 0o100644, text.as_bytes())
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(Path::new(path), 0o120777, target.as_bytes())
    }

    /// Copies a file in, readable and executable by everyone.
    pub fn file(&mut self, from: &Path, to: &str) -> Result<()> {
        let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.entry(Path::new(to), 0o100755, &data)
    }

    pub fn finish(mut self) -> Result<()> {
        let out = self.out.take().expect("put back by every entry");
        newc::trailer(out)?.flush()?;
        Ok(())
    }

    /// Adds what every VM has: PID 1, busybox and two users.
    pub fn base(&mut self, init: &Path) -> Result<()> {
        const BUSYBOX: &str = "/bin/busybox";
        // Otherwise the root directory would be world-writable.
        self.entry(Path::new("."), 0o040755, &[])?;
        self.file(init, "/init")?;
        self.file(Path::new(BUSYBOX), BUSYBOX)?;
        for applet in output(Command::new(BUSYBOX).arg("--list"))?.lines() {
            if applet != "busybox" {
                self.link(&format!("/bin/{applet}"), "busybox")?;
            }
        }
        self.entry(Path::new("/root"), 0o040700, &[])?;
        self.text("/etc/passwd", PASSWD)?;
        self.text("/etc/group", GROUP)
    }

    /// Adds [`MODULES`] and their dependencies, from a lib/modules/RELEASE tree.
    pub fn modules(&mut self, tree: &Path, release: &str) -> Result<()> {
        let path = tree.join("modules.dep");
        let dep = fs::read_to_string(&path)
            .with_context(|| format!("cannot read {} (depmod makes it)", path.display()))?;
        let needs: HashMap<&str, &str> = dep.lines().filter_map(|l| l.split_once(':')).collect();

        let mut wanted = BTreeSet::new();
        for name in MODULES {
            let file = needs.keys().find(|file| {
                let base = Path::new(file).file_name().and_then(|base| base.to_str());
                base.is_some_and(|base| base.split('.').next() == Some(name))
            });
            // No such file: the module is built in, or the test that needs it will report that.
            if let Some(file) = file {
                // modules.dep lists transitive dependencies too.
                wanted.insert(*file);
                wanted.extend(needs[file].split_whitespace());
            }
        }

        let root = format!("/lib/modules/{release}");
        let mut dep = String::new();
        for file in wanted {
            let plain = file.trim_end_matches(".xz");
            let data = match file.ends_with(".xz") {
                true => bytes(Command::new("xz").arg("-dc").arg(tree.join(file)))?,
                false => fs::read(tree.join(file))?,
            };
            self.entry(Path::new(&format!("{root}/{plain}")), 0o100644, &data)?;
            dep += &format!("{plain}:{}\n", needs[file].replace(".ko.xz", ".ko"));
        }
        self.text(&format!("{root}/modules.dep"), &dep)
    }

    /// Adds a whole directory, with its modes and symlinks.
    pub fn tree(&mut self, from: &Path, to: &Path) -> Result<()> {
        let read = || format!("cannot read {}", from.display());
        for entry in fs::read_dir(from).with_context(read)? {
            let entry = entry.with_context(read)?;
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.tree(&from, &to)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&from)?;
                self.entry(&to, 0o120777, target.as_os_str().as_bytes())?;
            } else {
                let mode = fs::metadata(&from)?.permissions().mode();
                self.entry(&to, mode, &fs::read(&from)?)?;
            }
        }
        Ok(())
    }
}

/// A command's standard output; an error if the command fails.
pub fn bytes(command: &mut Command) -> Result<Vec<u8>> {
    let what = format!("{command:?}");
    let out = command
        .output()
        .with_context(|| format!("cannot run {what}"))?;
    if !out.status.success() {
        io::stderr().write_all(&out.stderr)?;
        bail!("{what} failed: {}", out.status);
    }
    Ok(out.stdout)
}

fn output(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8(bytes(command)?)?)
}
