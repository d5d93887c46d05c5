//! Files that only their owner can read.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes a file of mode 0600; it appears whole or not at all.
pub(super) fn write(path: &Path, text: &str) -> io::Result<()> {
    let making = path.with_extension(format!("{}.tmp", std::process::id()));
    // A file that lies there already has an owner, a mode, or an end elsewhere that nobody here has chosen.
    match std::fs::remove_file(&making) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&making)?;
    file.write_all(format!("{text}\n").as_bytes())?;
    std::fs::rename(&making, path)
}

/// Reads a text of at most `bytes_max`; nothing where it is longer.
pub(super) fn read(path: &Path, bytes_max: u64) -> io::Result<Option<String>> {
    let mut text = String::new();
    // Not by its size: a pipe has none.
    let bytes = File::open(path)?.take(bytes_max + 1).read_to_string(&mut text)?;
    Ok((bytes as u64 <= bytes_max).then_some(text))
}
