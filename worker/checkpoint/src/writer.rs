//! Writing in the background: training hands over a snapshot and goes on.
//!
//! One thread with a runtime of its own takes snapshots from a place for one. What waits there when a newer one
//! comes is superseded; what is under way is finished if it progresses, and gives way if it does not.
//!
//! # Invariants
//! 1. At most two snapshots are held: one under way, one waiting.
//! 2. Every snapshot that was submitted has exactly one [`Outcome`].

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::blocking::run_here;
use crate::format::step_folder;
use crate::location::{Location, Patience};
use crate::retention::{Retention, retain};
use crate::save::{SaveError, Stop, save};
use crate::snapshot::{Snapshot, SnapshotError};
use crate::store::Store;
use crate::store_error::StoreError;
use crate::upload::{Control, Tuning};

/// How long a save that was stopped may take to tidy up.
const STOP_GRACE: Duration = Duration::from_secs(20);

/// Writes checkpoints in the background.
#[derive(Debug)]
pub struct Writer {
    inbox: watch::Sender<Inbox>,
    outcomes: mpsc::Receiver<Outcome>,
    reports: mpsc::Sender<Outcome>,
    thread: Option<JoinHandle<()>>,
    fate_of_newest: Fate,
}

/// What became of a snapshot.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// It is complete and durable.
    Saved(Saved),
    /// A newer one took its place before its writing began.
    Superseded {
        /// Its step.
        step: u64,
        /// The newer one's.
        by: u64,
    },
    /// It was not written. Earlier checkpoints are untouched.
    Failed {
        /// Its step.
        step: u64,
        /// Where it would have been.
        url: String,
        /// Why.
        error: SaveError,
    },
}

/// A checkpoint that was written.
#[derive(Debug)]
pub struct Saved {
    /// Its step.
    pub step: u64,
    /// Its address.
    pub url: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// How long writing it took.
    pub took: Duration,
    /// Steps whose checkpoints were removed after it.
    pub removed: Vec<u64>,
    /// Why older checkpoints could not be removed.
    pub not_removed: Option<SaveError>,
}

/// The newest snapshot is not in storage.
#[derive(Debug, thiserror::Error)]
#[error("the checkpoint of step {step} was not written: {why}")]
pub struct FinishError {
    /// Its step.
    pub step: u64,
    /// Why.
    pub why: String,
    /// Outcomes that were not polled yet, this one's included.
    pub outcomes: Vec<Outcome>,
}

/// What the trainer's thread leaves for the writer's.
#[derive(Debug, Default)]
struct Inbox {
    waiting: Option<Snapshot>,
    /// Set once: end by then, with the work done if possible.
    close_by: Option<Instant>,
}

/// What is known of the newest snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    /// Nothing was submitted, or it is saved.
    Settled,
    Pending(u64),
    Failed(u64, String),
}

impl Writer {
    /// Opens the location, making the folder if there is none, and starts the thread.
    pub fn start(location: &Location, retention: Retention, tuning: Tuning) -> Result<Writer, StoreError> {
        let store = location.create(Patience::Long)?;
        let (inbox, incoming) = watch::channel(Inbox::default());
        let (reports, outcomes) = mpsc::channel();
        let background =
            Background { store, retention, tuning, inbox: inbox.clone(), reports: reports.clone() };
        let run = move || run_here(async || background.run(incoming).await);
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(run);
        let thread = Some(thread.expect("a thread can be started"));
        Ok(Writer { inbox, outcomes, reports, thread, fate_of_newest: Fate::Settled })
    }

    /// Hands a snapshot over and returns at once; it supersedes one that still waits. Errors only if the snapshot
    /// contradicts itself.
    pub fn submit(&mut self, snapshot: Snapshot) -> Result<(), SnapshotError> {
        snapshot.check()?;
        let by = snapshot.step;
        self.fate_of_newest = Fate::Pending(by);
        let mut superseded = None;
        self.inbox.send_modify(|inbox| superseded = inbox.waiting.replace(snapshot));
        if let Some(Snapshot { step, .. }) = superseded {
            self.report(Outcome::Superseded { step, by });
        }
        Ok(())
    }

    /// What became of snapshots since the last call.
    pub fn poll_outcomes(&mut self) -> Vec<Outcome> {
        let outcomes: Vec<Outcome> = self.outcomes.try_iter().collect();
        outcomes.iter().for_each(|outcome| self.fate_of_newest.learn(outcome));
        outcomes
    }

    /// Waits until all that was submitted has its outcome, for `patience` at most (and a few seconds to tidy up).
    /// Errors if the newest snapshot is not in storage.
    pub fn finish(mut self, patience: Duration) -> Result<Vec<Outcome>, FinishError> {
        self.close(patience);
        let outcomes = self.poll_outcomes();
        match std::mem::replace(&mut self.fate_of_newest, Fate::Settled) {
            Fate::Settled => Ok(outcomes),
            Fate::Failed(step, why) => Err(FinishError { step, why, outcomes }),
            Fate::Pending(step) => {
                Err(FinishError { step, why: "the writer's thread ended early".into(), outcomes })
            }
        }
    }

    fn close(&mut self, patience: Duration) {
        let Some(thread) = self.thread.take() else { return };
        self.inbox.send_modify(|inbox| inbox.close_by = Some(Instant::now() + patience));
        if thread.join().is_err() {
            tracing::error!("checkpoint: the writer's thread panicked");
        }
    }

    fn report(&self, outcome: Outcome) {
        self.reports.send(outcome).expect("the receiver is in the same struct");
    }
}

/// A writer that is dropped gives up what is under way.
impl Drop for Writer {
    fn drop(&mut self) {
        self.close(Duration::ZERO);
    }
}

impl Fate {
    fn learn(&mut self, outcome: &Outcome) {
        let Fate::Pending(newest) = *self else { return };
        match outcome {
            Outcome::Saved(saved) if saved.step == newest => *self = Fate::Settled,
            Outcome::Failed { step, error, .. } if *step == newest => {
                *self = Fate::Failed(newest, error.to_string());
            }
            Outcome::Saved(_) | Outcome::Failed { .. } | Outcome::Superseded { .. } => {}
        }
    }
}

/// The thread's half.
struct Background {
    store: Store,
    retention: Retention,
    tuning: Tuning,
    inbox: watch::Sender<Inbox>,
    reports: mpsc::Sender<Outcome>,
}

impl Background {
    async fn run(self, mut incoming: watch::Receiver<Inbox>) {
        loop {
            let something = |inbox: &Inbox| inbox.waiting.is_some() || inbox.close_by.is_some();
            if incoming.wait_for(something).await.is_err() {
                return;
            }
            let mut next = None;
            self.inbox.send_if_modified(|inbox| {
                next = inbox.waiting.take();
                next.is_some()
            });
            let Some(snapshot) = next else { return };
            let outcome = self.save(&snapshot, &incoming).await;
            // Nobody listens only when the writer was dropped.
            let _ = self.reports.send(outcome);
        }
    }

    /// Saves, or gives up when there is a reason to.
    async fn save(&self, snapshot: &Snapshot, incoming: &watch::Receiver<Inbox>) -> Outcome {
        let (stop, stopped) = watch::channel(None);
        let (progress, progressed) = watch::channel(0);
        let control = Control { stop: stopped, progress };
        let saving = self.save_and_retain(snapshot, &control);
        tokio::pin!(saving);
        let done = tokio::select! {
            biased;
            done = &mut saving => done,
            reason = self.reason_to_stop(incoming.clone(), progressed) => {
                stop.send_replace(Some(reason));
                tokio::time::timeout(STOP_GRACE, saving).await.unwrap_or(Err(reason.into()))
            }
        };
        let (step, url) = (snapshot.step, self.store.url(&step_folder(snapshot.step)));
        done.map_or_else(|error| Outcome::Failed { step, url, error }, Outcome::Saved)
    }

    async fn save_and_retain(&self, snapshot: &Snapshot, control: &Control) -> Result<Saved, SaveError> {
        let (begun, step) = (Instant::now(), snapshot.step);
        let bytes = save(&self.store, snapshot, &self.tuning, control).await?;
        let took = begun.elapsed();
        let (removed, not_removed) = match control.race(retain(&self.store, self.retention, step)).await {
            Ok(Ok(removed)) => (removed, None),
            Ok(Err(error)) => (Vec::new(), Some(error.into())),
            Err(stop) => (Vec::new(), Some(stop.into())),
        };
        Ok(Saved { step, url: self.store.url(&step_folder(step)), bytes, took, removed, not_removed })
    }

    /// Resolves when what is under way should be given up.
    async fn reason_to_stop(
        &self,
        incoming: watch::Receiver<Inbox>,
        progressed: watch::Receiver<u64>,
    ) -> Stop {
        tokio::select! {
            () = tokio::time::sleep(self.tuning.deadline) => Stop::Deadline(self.tuning.deadline),
            () = closing(incoming.clone()) => Stop::Closing,
            by = self.newer_and_stalled(incoming, progressed) => Stop::Newer { by },
        }
    }

    async fn newer_and_stalled(
        &self,
        mut incoming: watch::Receiver<Inbox>,
        mut progress: watch::Receiver<u64>,
    ) -> u64 {
        let by = match incoming.wait_for(|inbox| inbox.waiting.is_some()).await {
            Ok(inbox) => inbox.waiting.as_ref().map_or(0, |newer| newer.step),
            Err(_) => return std::future::pending().await,
        };
        progress.mark_unchanged();
        while let Ok(Ok(())) = tokio::time::timeout(self.tuning.stall, progress.changed()).await {}
        by
    }
}

/// Resolves when the time to end has come.
async fn closing(mut incoming: watch::Receiver<Inbox>) {
    let close_by = match incoming.wait_for(|inbox| inbox.close_by.is_some()).await {
        Ok(inbox) => inbox.close_by,
        Err(_) => None,
    };
    match close_by {
        Some(close_by) => tokio::time::sleep_until(close_by).await,
        None => std::future::pending().await,
    }
}
