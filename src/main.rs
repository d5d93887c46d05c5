//! The program for the built-in language model; `mattock::main` does the rest.

use std::process::ExitCode;

/// Training allocates and frees large buffers all the time; this is a quarter faster than the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    mattock::main::<mattock::Gpt>()
}
