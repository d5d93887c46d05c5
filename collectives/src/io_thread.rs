//! A thread that does nothing but IO: one single-threaded runtime, on which all links of a node are driven.
//!
//! One thread per endpoint is what measures best for QUIC, and it keeps the caller's threads free of async code.
//! When the last owner lets go, the thread ends: what is under way gets [`FLUSH_MAX`] to finish.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// How long the end of the thread waits for links to hand over what was sent.
const FLUSH_MAX: Duration = Duration::from_secs(5);

type Teardown = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A thread with a runtime, joined on drop.
pub struct IoThread {
    handle: Handle,
    /// Cloned into every tracked task: the runtime ends when none is left.
    alive: Option<mpsc::Sender<()>>,
    end: Mutex<Option<oneshot::Sender<Teardown>>>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts a thread of that name.
    ///
    /// # Errors
    /// If the system gives us no thread or no event queue.
    pub fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (alive, tasks) = mpsc::channel(1);
        let (end, ended) = oneshot::channel();
        let thread =
            std::thread::Builder::new().name(name.into()).spawn(move || run(&runtime, ended, tasks))?;
        Ok(Self { handle, alive: Some(alive), end: Mutex::new(Some(end)), thread: Some(thread) })
    }

    /// Runs a task; the thread does not end before it.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let alive = self.alive.clone();
        self.handle.spawn(async move {
            task.await;
            drop(alive);
        });
    }

    /// Runs a task that ends with the thread, at the latest.
    pub(crate) fn spawn_background(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(task);
    }

    /// The runtime, for what must be created within it.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// What the thread does last, after all tasks.
    pub(crate) fn end_with(&self, teardown: impl Future<Output = ()> + Send + 'static) {
        if let Some(end) = self.end.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A thread that has ended already has nothing to tear down.
            let _ = end.send(Box::pin(teardown));
        }
    }
}

impl std::fmt::Debug for IoThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoThread").field("handle", &self.handle).finish_non_exhaustive()
    }
}

fn run(runtime: &Runtime, ended: oneshot::Receiver<Teardown>, mut tasks: mpsc::Receiver<()>) {
    runtime.block_on(async {
        let teardown: Option<Teardown> = ended.await.ok();
        let all_done = async { while tasks.recv().await.is_some() {} };
        if timeout(FLUSH_MAX, all_done).await.is_err() {
            tracing::warn!("links were not flushed within {FLUSH_MAX:?}; giving up on them");
        }
        if let Some(teardown) = teardown {
            teardown.await;
        }
    });
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.alive = None;
        self.end_with(async {});
        let this_thread = std::thread::current().id();
        if let Some(thread) = self.thread.take()
            // The last owner may be a task of the thread itself, which cannot wait for its own end.
            && thread.thread().id() != this_thread
            && thread.join().is_err()
        {
            tracing::error!("an IO thread has panicked");
        }
    }
}
