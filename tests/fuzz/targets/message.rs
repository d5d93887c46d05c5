//! Messages of the control connection, in both directions: what is read is written as it was, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mattock_coordinator::protocol::{FromCoordinator, FromWorker};
use mattock_coordinator::wire::{HEADER_BYTES, decode, decode_header};

fuzz_target!(|bytes: &[u8]| {
    if let Some((header, _)) = bytes.split_first_chunk::<HEADER_BYTES>() {
        let _ = decode_header(*header);
    }
    let _ = decode::<FromWorker>(bytes);
    let _ = decode::<FromCoordinator>(bytes);
});
