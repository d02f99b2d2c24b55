// SPDX-License-Identifier: GPL-2.0

//! Finds the command and checks that a library can be preloaded into it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

use object::Endianness;
use object::elf::EM_X86_64;
use object::elf::FileHeader64;
use object::elf::PT_INTERP;
use object::read::elf::FileHeader;
use object::read::elf::ProgramHeader;
use rustix::fs::Access;
use rustix::fs::access;
use rustix::fs::getxattr;
use rustix::process::getegid;
use rustix::process::geteuid;

use crate::Failure;

/// Returns the path that a shell would run for this word.
pub fn find(word: &OsStr) -> Result<PathBuf, Failure> {
    let named = Path::new(word);
    let candidates: Vec<PathBuf> = if word.as_encoded_bytes().contains(&b'/') {
        vec![named.into()]
    } else {
        let list = env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
        // An empty entry means the current directory. Joining to "." gives every candidate a
        // slash, so exec does not search PATH again.
        env::split_paths(&list)
            .map(|dir| Path::new(".").join(dir).join(named))
            .collect()
    };
    let files: Vec<_> = candidates
        .into_iter()
        .filter(|path| path.exists())
        .collect();
    let Some(first) = files.first() else {
        return Err(Failure::new(
            127,
            format!("{}: command not found", named.display()),
        ));
    };
    files
        .iter()
        .find(|path| path.is_file() && access(path.as_path(), Access::EXEC_OK).is_ok())
        .cloned()
        .ok_or_else(|| Failure::new(126, format!("{} is not executable", first.display())))
}

/// Returns true if exec sets AT_SECURE, which makes the dynamic linker ignore LD_PRELOAD paths.
fn gains_privilege(path: &Path) -> Result<bool, Failure> {
    if geteuid().is_root() {
        return Ok(false);
    }
    let meta = fs::metadata(path)?;
    let setuid = meta.mode() & 0o4000 != 0 && meta.uid() != geteuid().as_raw();
    let setgid = meta.mode() & 0o2010 == 0o2010 && meta.gid() != getegid().as_raw();
    let capable = getxattr(path, "security.capability", &mut [0u8; 64]).is_ok();
    Ok(setuid || setgid || capable)
}

/// Returns why no library can be preloaded into this image, or None if one can.
fn obstacle(image: &[u8]) -> Option<&'static str> {
    if image.starts_with(b"#!") {
        // The script may start UML, which inherits the environment.
        return None;
    }
    if !image.starts_with(b"\x7fELF") {
        return Some("it is neither an ELF program nor a script");
    }
    let machine = "it is not an x86-64 program";
    let Ok(header) = FileHeader64::<Endianness>::parse(image) else {
        return Some(machine);
    };
    let Ok(endian) = header.endian() else {
        return Some(machine);
    };
    if header.e_machine(endian) != EM_X86_64 {
        return Some(machine);
    }
    match header.program_headers(endian, image) {
        Ok(headers) if headers.iter().any(|h| h.p_type(endian) == PT_INTERP) => None,
        Ok(_) => Some("it is statically linked (Debian's linux.uml is not)"),
        Err(_) => Some("its ELF headers are damaged"),
    }
}

/// Returns an error if the library cannot be preloaded into this program.
pub fn check(path: &Path) -> Result<(), Failure> {
    let refuse = |why| {
        Failure::new(
            123,
            format!("cannot preload into {}: {why}", path.display()),
        )
    };
    // The program headers follow the ELF header; 64 KiB holds over a thousand of them.
    let mut image = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(65536).read_to_end(&mut image)?,
        // Executable but not readable: run it; a missing memory file is reported at its end.
        Err(_) => return Ok(()),
    };
    if let Some(why) = obstacle(&image) {
        return Err(refuse(why));
    }
    if gains_privilege(path)? {
        return Err(refuse("it is setuid, setgid or has file capabilities"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_dynamic_program_and_script() {
        let shell = fs::read("/bin/sh").unwrap();
        assert_eq!(obstacle(&shell), None);
        assert_eq!(obstacle(b"#!/bin/sh\n"), None);
    }

    #[test]
    fn rejects_other_images() {
        let mut own = fs::read("/bin/sh").unwrap();
        assert!(obstacle(b"some text").unwrap().contains("neither"));
        own[4] = 1; // EI_CLASS: 32 bits
        assert!(obstacle(&own).unwrap().contains("x86-64"));
        own[4] = 2;
        own[18] = 0xb7; // e_machine: AArch64
        assert!(obstacle(&own).unwrap().contains("x86-64"));
        own[18] = 62; // EM_X86_64
        own[56] = 0; // e_phnum: zero, so no PT_INTERP
        own[57] = 0;
        assert!(obstacle(&own).unwrap().contains("static"));
    }
}
