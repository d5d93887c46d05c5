//! Small runtimes for what is asynchronous inside: the caller's thread waits, or the writer's has one for itself.

use tokio::runtime::Builder;

/// Does asynchronous work to its end, on a runtime and a thread of its own.
///
/// The thread makes it irrelevant whether the caller is inside a runtime itself.
pub(crate) fn block_on<T: Send>(work: impl AsyncFnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(|| run_here(work)).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Does asynchronous work to its end, on this thread. What it left running in the background (a read from a dead
/// network drive, a name that is being resolved) is not waited for.
pub(crate) fn run_here<T>(work: impl AsyncFnOnce() -> T) -> T {
    let runtime =
        Builder::new_current_thread().enable_all().build().expect("a runtime needs a few file descriptors");
    let done = runtime.block_on(work());
    runtime.shutdown_background();
    done
}
