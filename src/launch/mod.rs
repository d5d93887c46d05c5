//! Starting a run's processes, and never leaving one behind.
//!
//! A child is tied to its parent three times: its standard input is a pipe that ends with the parent, the
//! kernel kills it when the parent dies ([`die_with_parent`]), and the parent kills what is left when it
//! gives up.
//!
//! On several machines a launcher (Slurm, Kubernetes, ssh) starts this program once on each: [`Place`] says which of them
//! has the coordinator ([`LocalRun`]) and which only workers ([`FollowedRun`]).
//!
//! Deliberately absent: starting anything on another machine.

mod address;
mod child;
mod deadlines;
mod follow;
mod lines;
mod local;
mod place;
mod scale;
mod slots;
mod successor;
#[cfg(test)]
mod tests;
mod watchdog;

use std::ffi::OsString;
use std::io;
use std::num::NonZeroU32;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

pub use address::address_towards_others;
pub use child::{Program, Role};
pub use deadlines::Deadlines;
pub use follow::{Followed, FollowedRun, TokenSource, WorkerEvent};
pub use local::{Ended, LaunchError, Line, Listening, LocalRun, WorkerProgram};
pub use place::{Flags, Place, PlaceError};

/// The parent's process id, in a child's environment.
const PARENT: &str = "MATTOCK_PARENT";
/// Holds the run's secret, where it does not lie in the run's folder. Workers are not given it.
pub const SECRET_VARIABLE: &str = "MATTOCK_RUN_SECRET";
/// How many threads a worker computes with.
const THREADS: &str = "RAYON_NUM_THREADS";

/// To be called first thing by a program that [`LocalRun`] starts: from here on the kernel kills this
/// process when its parent dies. Does nothing in a process that was started otherwise.
///
/// Linux ties a child to the parent's *thread*: the parent must start its children from a thread that lives
/// as long as it does, such as the main thread under a current-thread runtime.
///
/// # Errors
/// Where the parent is gone already: the process should end.
pub fn die_with_parent() -> io::Result<()> {
    let Some(parent) = std::env::var_os(PARENT) else { return Ok(()) };
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // Between the parent's fork and the line above it may have died without a signal to us.
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if now.map(OsString::from) != Some(parent) {
        return Err(io::Error::other("the process that started this one is gone"));
    }
    Ok(())
}

/// The signals that stop a run: Ctrl-C, SIGTERM, and SIGUSR1, which is Slurm's notice. One message for the first; after that
/// only Ctrl-C sends another, for launchers signal more than once, to several processes, and mean the same.
/// Must be called within a Tokio runtime.
///
/// # Errors
/// Where the system refuses to install handlers.
pub fn stop_signals() -> io::Result<mpsc::Receiver<()>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut notice = signal(SignalKind::user_defined1())?;
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(async move {
        let mut told = false;
        loop {
            let insists = tokio::select! {
                Some(()) = interrupt.recv() => true,
                Some(()) = terminate.recv() => false,
                Some(()) = notice.recv() => false,
                () = sender.closed() => return,
                else => return,
            };
            if insists || !told {
                // More than two that nobody has taken yet say nothing new.
                let _ = sender.try_send(());
            }
            told = true;
        }
    });
    Ok(receiver)
}

/// The signals that tell a worker to leave, each as a reason in words: SIGTERM (a pod's or a node's end), SIGUSR1 (Slurm's
/// notice), Ctrl-C. A thread waits for them as long as the program lives.
///
/// # Errors
/// Where the system refuses to install handlers, or a thread.
pub fn reasons_to_leave() -> io::Result<std::sync::mpsc::Receiver<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut notice, mut interrupt) = {
        let _within = runtime.enter();
        (
            signal(SignalKind::terminate())?,
            signal(SignalKind::user_defined1())?,
            signal(SignalKind::interrupt())?,
        )
    };
    let (sender, reasons) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("mattock-signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            loop {
                let name = tokio::select! {
                    Some(()) = terminate.recv() => "SIGTERM",
                    Some(()) = notice.recv() => "SIGUSR1",
                    Some(()) = interrupt.recv() => "SIGINT",
                    else => return,
                };
                if sender.send(format!("it received {name}")).is_err() {
                    return;
                }
            }
        });
    })?;
    Ok(reasons)
}

/// How many threads each of `workers` computes with, for its environment; nothing where the user has said.
fn worker_environment(workers: NonZeroU32) -> Option<(&'static str, String)> {
    std::env::var_os(THREADS).is_none().then(|| (THREADS, threads_per_worker(workers).to_string()))
}

/// Threads that each of `workers` computes with on this machine.
pub fn threads_per_worker(workers: NonZeroU32) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    share(cores, workers)
}

fn share(cores: usize, workers: NonZeroU32) -> usize {
    (cores / workers.get() as usize).max(1)
}
