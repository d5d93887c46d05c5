//! The manifest of a checkpoint: what is read is written as it was, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mattock_checkpoint::Manifest;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::decode(bytes) {
        let again = Manifest::decode(&manifest.encode());
        assert_eq!(again.as_ref(), Ok(&manifest), "a manifest that was read can be written");
    }
});
