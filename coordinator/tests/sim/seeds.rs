//! Trying many seeds, and telling how to try a failing one again.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::facts::Violation;

/// Seeds of a test, where the environment does not say otherwise.
const SEEDS: u64 = 4_000;
/// Lines of a trace that are printed.
const TRACE_LINES_MAX: usize = 400;

/// How many seeds each test tries.
const SEEDS_VARIABLE: &str = "MATTOCK_SIM_SEEDS";
/// The one seed to replay.
const SEED_VARIABLE: &str = "MATTOCK_SIM_SEED";

thread_local! {
    /// What happened in the run at hand, while somebody wants to know.
    static TRACE: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Notes what happens, where a trace is wanted; the text is only made then.
pub(crate) fn trace(text: impl FnOnce() -> String) {
    TRACE.with_borrow_mut(|trace| {
        if let Some(lines) = trace {
            lines.push(text());
        }
    });
}

/// Runs `scenario` for one seed and returns its trace, and how it failed if it did.
pub(crate) fn traced(
    seed: u64,
    scenario: impl Fn(u64) -> Result<(), Violation>,
) -> (Vec<String>, Option<String>) {
    TRACE.set(Some(Vec::new()));
    let failure = failure_of(seed, &scenario);
    (TRACE.take().unwrap_or_default(), failure)
}

fn failure_of(seed: u64, scenario: &impl Fn(u64) -> Result<(), Violation>) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(|| scenario(seed))) {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation.to_string()),
        Err(panic) => Some(panic_text(panic.as_ref())),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

fn from_environment(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable}={value} is no number")))
}

/// Tries a scenario with every seed; at the first that fails, prints what happened and how to replay it.
///
/// Returns whether the whole stretch of seeds was tried, rather than one or fewer than usual.
pub(crate) fn for_each_seed(scenario: impl Fn(u64) -> Result<(), Violation>) -> bool {
    for_each_seed_of(1, scenario)
}

/// The same for a scenario that takes long: one seed of so many.
pub(crate) fn for_each_seed_of(rarity: u64, scenario: impl Fn(u64) -> Result<(), Violation>) -> bool {
    if let Some(seed) = from_environment(SEED_VARIABLE) {
        let (trace, failure) = traced(seed, &scenario);
        println!("{}", trace.join("\n"));
        assert!(failure.is_none(), "seed {seed}: {}", failure.unwrap_or_default());
        return false;
    }
    let seeds = from_environment(SEEDS_VARIABLE).unwrap_or(SEEDS);
    for seed in 0..seeds.div_ceil(rarity) {
        if let Some(failure) = failure_of(seed, &scenario) {
            fail(seed, &failure, &scenario);
        }
    }
    seeds >= SEEDS
}

fn fail(seed: u64, failure: &str, scenario: &impl Fn(u64) -> Result<(), Violation>) -> ! {
    let (trace, again) = traced(seed, scenario);
    let skipped = trace.len().saturating_sub(TRACE_LINES_MAX);
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("");
    let repeated = match again.as_deref() == Some(failure) {
        true => "",
        false => "\n(the second run of this seed failed otherwise: something here is not deterministic)",
    };
    panic!(
        "seed {seed}: {failure}{repeated}\n\n{skipped} earlier lines, then:\n{}\n\nreplay with: \
         {SEED_VARIABLE}={seed} cargo test -p mattock-coordinator --test sim -- --exact {name} --nocapture\n",
        trace[skipped..].join("\n")
    )
}
