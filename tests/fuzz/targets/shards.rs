//! The list of shards of a published dataset, the manifest of a local one, and a size that somebody wrote.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mattock_data::Published;
use mattock_data::config::parse_size;

fuzz_target!(|bytes: &[u8]| {
    let _ = Published::parse(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = parse_size(text);
    }
});
