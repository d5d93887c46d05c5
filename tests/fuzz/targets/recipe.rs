//! A recipe: an error that says what is wrong, or a plan; printed and read again it is the same.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use mattock::recipe::Resolved;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Resolved::parse(text, Path::new("recipe.toml")) {
        Ok(recipe) => {
            let again = Resolved::parse(&recipe.text, Path::new("recipe.toml"));
            assert!(again.is_ok_and(|again| again.plan == recipe.plan), "what is printed is the same recipe");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
