//! What a worker is: its host's name, and a fingerprint of all that its bits depend on.

use std::fs;

use mattock_kernels::Device;

/// The host's name, or a placeholder where it has none.
pub(crate) fn name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "unknown".to_owned() } else { name.trim().to_owned() }
}

/// Binary, device and processor features: workers with equal fingerprints compute equal bits.
pub(crate) fn fingerprint(device: &Device) -> String {
    let binary = std::env::current_exe()
        .and_then(fs::read)
        .map(|bytes| blake3::hash(&bytes).to_hex()[..16].to_owned());
    let binary = binary.unwrap_or_else(|error| format!("unreadable: {error}"));
    format!("binary {binary}, device {device}, {}", mattock_kernels::cpu_features())
}
