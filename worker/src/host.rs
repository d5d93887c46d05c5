//! What a worker is: its host's name, and a fingerprint of all that its bits depend on.

use std::fs::{self, File};
use std::io;

use mattock_kernels::Device;

/// The processes' name space of everything that no container holds.
const OUTERMOST: &str = "pid:[4026531836]";

/// The host's name, or a placeholder where it has none. Within a container, its space of process numbers too: two
/// containers of one host may have its name, and processes of one number.
pub fn name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = if name.trim().is_empty() { "unknown" } else { name.trim() };
    match fs::read_link("/proc/self/ns/pid").map(|link| link.to_string_lossy().into_owned()) {
        Ok(space) if space != OUTERMOST => format!("{name} {space}"),
        _ => name.to_owned(),
    }
}

/// The same number, not negative, for processes that reach each other without leaving the machine: one boot of one kernel, and one
/// space of networks. Where the system does not tell, it goes by the name.
pub(crate) fn machine() -> i64 {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let network = fs::read_link("/proc/self/ns/net");
    let text = match (boot, network) {
        (Ok(boot), Ok(network)) => format!("{boot}{}", network.display()),
        _ => name(),
    };
    let digest: [u8; 32] = blake3::hash(text.as_bytes()).into();
    digest.iter().take(7).fold(0, |number, byte| number << 8 | i64::from(*byte))
}

/// Binary, device and processor features: workers with equal fingerprints compute equal bits.
///
/// # Errors
/// Where this program cannot be read.
pub(crate) fn fingerprint(device: &Device) -> io::Result<String> {
    Ok(format!("binary {}, device {device}, {}", binary_hash()?, mattock_kernels::cpu_features()))
}

/// The first 16 hexadecimal digits of the BLAKE3 of this program; read piece by piece, for it is large.
fn binary_hash() -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    // By this name it opens even where another build has taken its place meanwhile.
    hasher.update_reader(File::open("/proc/self/exe")?)?;
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}
