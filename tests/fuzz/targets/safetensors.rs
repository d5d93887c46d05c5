//! The header of a safetensors file, in one chunk and byte by byte: the same answer, and no panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mattock_checkpoint::header_of;

fuzz_target!(|file: &[u8]| {
    let whole = header_of(file, file.len().max(1));
    let bytewise = header_of(file, 1);
    assert_eq!(whole, bytewise, "chunks leave no trace");
});
