//! One small runtime for callers without one: the caller's thread waits, the work is asynchronous inside.

/// Does asynchronous work to its end, on a runtime and a thread of its own.
///
/// The thread makes it irrelevant whether the caller is inside a runtime itself.
pub(crate) fn block_on<T: Send>(work: impl AsyncFnOnce() -> T + Send) -> T {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime needs a few file descriptors").block_on(work())
    };
    std::thread::scope(|scope| match scope.spawn(run).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
