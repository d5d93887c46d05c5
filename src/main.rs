//! The program for the built-in language model; `mattock::main` does the rest.

use std::process::ExitCode;

/// Training allocates and frees large buffers all the time; this is a quarter faster than the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How many milliseconds it waits before it gives memory back to the system. Longer than a step: training and links ask for the
/// same buffers again and again, and every page given back is cleared anew.
const PURGE_DELAY_MS: i64 = 60_000;
/// `mi_option_purge_delay` of mimalloc.h, which the bindings leave out.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

fn main() -> ExitCode {
    // SAFETY: there is no other thread yet. `MIMALLOC_PURGE_DELAY` in the environment comes before this.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, PURGE_DELAY_MS) };
    mattock::main::<mattock::Gpt>()
}
