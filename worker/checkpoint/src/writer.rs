//! Writing in the background: training hands over a snapshot and goes on.
//!
//! One thread with a runtime of its own takes snapshots from a place for one. What waits there when a newer one
//! comes is superseded; what is under way is finished if it progresses, and gives way if it does not.
//!
//! # Invariants
//! 1. At most two snapshots are held: one under way, one waiting.
//! 2. Every snapshot that was submitted has exactly one [`Outcome`]; before that, share 0 of several is told [`Outcome::Written`].
//! 3. Only share 0 waits for the others, and it does so beside its work: a share that never comes delays nothing.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::blocking::run_here;
use crate::format::step_folder;
use crate::location::{Location, Patience};
use crate::retention::{Retention, retain};
use crate::save::{SaveError, Stop, Written, save};
use crate::share::Share;
use crate::shares::{complete, missing};
use crate::snapshot::{Attempt, Snapshot, SnapshotError};
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

/// Share 0 waits so long, at least, before it looks again whether others are done.
const LOOK_MIN: Duration = Duration::from_millis(20);

/// What became of a snapshot.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// It is complete and durable.
    Saved(Saved),
    /// This share is durable. Whether the checkpoint gets complete is the business of share 0, which is told later.
    Written {
        /// Its step.
        step: u64,
        /// Which share.
        share: Share,
        /// The share's size in bytes.
        bytes: u64,
        /// How long writing it took.
        took: Duration,
    },
    /// Other shares did not come, and nothing of it will be used.
    Incomplete {
        /// Its step.
        step: u64,
        /// Where it would have been.
        url: String,
        /// Shares that are missing, as far as it is known.
        missing: Vec<u32>,
    },
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
    /// Whether others' shares are waited for then.
    leave: bool,
}

/// What is known of the newest snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    /// Nothing was submitted, or it is saved, or others will finish it.
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
        let background = Background {
            store,
            retention,
            tuning,
            inbox: inbox.clone(),
            reports: reports.clone(),
            awaited: Vec::new(),
        };
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

    /// As [`Writer::finish`], but waits for what this writer itself writes only: whether others finish what it has a share of
    /// is told to nobody any more.
    pub fn leave(mut self, patience: Duration) -> Vec<Outcome> {
        self.inbox.send_modify(|inbox| inbox.leave = true);
        self.close(patience);
        self.poll_outcomes()
    }

    /// Whether no snapshot waits: one that is submitted now supersedes none.
    pub fn is_free(&self) -> bool {
        self.inbox.borrow().waiting.is_none()
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
        let (Fate::Pending(newest) | Fate::Failed(newest, _)) = &*self else { return };
        let newest = *newest;
        match outcome {
            Outcome::Saved(saved) if saved.step == newest => *self = Fate::Settled,
            Outcome::Written { step, share, .. } if *step == newest && share.index > 0 => {
                *self = Fate::Settled
            }
            Outcome::Failed { step, error, .. } if *step == newest => {
                *self = Fate::Failed(newest, error.to_string());
            }
            Outcome::Incomplete { step, missing, .. } if *step == newest => {
                *self = Fate::Failed(newest, format!("shares {missing:?} did not come"));
            }
            _ => {}
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
    /// Checkpoints of which share 0 is written, and others are not yet.
    awaited: Vec<Awaited>,
}

/// A checkpoint that waits for its other shares.
struct Awaited {
    attempt: Attempt,
    begun: Instant,
    /// When this share was there.
    written: Instant,
}

/// What the thread does next.
enum Next {
    Save(Box<Snapshot>),
    Look,
    End,
}

impl Background {
    async fn run(mut self, mut incoming: watch::Receiver<Inbox>) {
        loop {
            match self.next(&mut incoming).await {
                Next::Save(snapshot) => {
                    // It is told of this one, then.
                    self.awaited.retain(|awaited| awaited.attempt.step != snapshot.step);
                    let outcome = self.save(&snapshot, &incoming).await;
                    self.tell(outcome);
                }
                Next::Look => self.look(&incoming).await,
                Next::End => break,
            }
        }
        let awaited = std::mem::take(&mut self.awaited);
        if !incoming.borrow().leave {
            awaited.into_iter().for_each(|awaited| self.give_up(awaited, Vec::new()));
        }
    }

    /// Waits for work, or until it is time to look whether others are done.
    async fn next(&self, incoming: &mut watch::Receiver<Inbox>) -> Next {
        let closing = incoming.borrow().close_by;
        let something = |inbox: &Inbox| inbox.waiting.is_some() || inbox.close_by != closing;
        let waited = match (self.awaited.is_empty(), closing) {
            (true, Some(_)) => Ok(Ok(())),
            (true, None) => Ok(incoming.wait_for(something).await.map(drop)),
            (false, _) => tokio::time::timeout(self.until_next_look(), incoming.wait_for(something))
                .await
                .map(|w| w.map(drop)),
        };
        if matches!(waited, Ok(Err(_))) {
            return Next::End;
        }
        let mut next = None;
        self.inbox.send_if_modified(|inbox| {
            next = inbox.waiting.take();
            next.is_some()
        });
        let (close_by, leave) = {
            let inbox = incoming.borrow_and_update();
            (inbox.close_by, inbox.leave)
        };
        match next {
            None if leave && close_by.is_some() => Next::End,
            Some(snapshot) => Next::Save(Box::new(snapshot)),
            None if self.awaited.is_empty() && close_by.is_none() => Next::Look,
            None if self.awaited.is_empty() || close_by.is_some_and(|by| by <= Instant::now()) => Next::End,
            None => Next::Look,
        }
    }

    /// Nobody listens only when the writer was dropped.
    fn tell(&self, outcome: Outcome) {
        let _ = self.reports.send(outcome);
    }

    /// Others have as much to write, so they are done soon, or much later.
    fn until_next_look(&self) -> Duration {
        let written = self.awaited.iter().map(|awaited| awaited.written.elapsed()).min();
        (written.unwrap_or_default() / 4).clamp(LOOK_MIN.min(self.tuning.look), self.tuning.look)
    }

    /// Looks whether what is waited for is complete; what is too old is given up.
    async fn look(&mut self, incoming: &watch::Receiver<Inbox>) {
        let mut newest = None;
        for awaited in std::mem::take(&mut self.awaited) {
            match self.look_at(&awaited, incoming).await {
                Ok(Ok(saved)) => {
                    newest = newest.max(Some(saved.step));
                    self.tell(Outcome::Saved(saved));
                }
                Ok(Err(missing)) if awaited.begun.elapsed() > self.tuning.deadline => {
                    self.give_up(awaited, missing);
                }
                Err(error) if !is_worth_waiting(&error) => {
                    let (step, url) = (awaited.attempt.step, self.url(awaited.attempt.step));
                    self.tell(Outcome::Failed { step, url, error });
                }
                Ok(Err(_)) | Err(_) => self.awaited.push(awaited),
            }
        }
        self.give_up_before(newest.unwrap_or(0));
    }

    /// What is older than a complete one is of no use to anybody any more.
    fn give_up_before(&mut self, step: u64) {
        let awaited = std::mem::take(&mut self.awaited).into_iter();
        let (older, rest): (Vec<_>, Vec<_>) = awaited.partition(|awaited| awaited.attempt.step < step);
        self.awaited = rest;
        older.into_iter().for_each(|awaited| self.give_up(awaited, Vec::new()));
    }

    /// What is saved, or which shares are missing.
    async fn look_at(
        &self,
        Awaited { attempt, begun, .. }: &Awaited,
        incoming: &watch::Receiver<Inbox>,
    ) -> Result<Result<Saved, Vec<u32>>, SaveError> {
        let (stop, stopped) = watch::channel(None);
        let control = Control { stop: stopped, progress: watch::channel(0).0 };
        let looking = async {
            match complete(&self.store, attempt, &self.tuning, &control).await? {
                Some(manifest) => Ok(Ok(self.saved(attempt, *begun, manifest.bytes(), &control).await)),
                None => Ok(Err(missing(&self.store, attempt, &control).await?)),
            }
        };
        tokio::pin!(looking);
        tokio::select! {
            biased;
            looked = &mut looking => looked,
            () = closing(incoming.clone()) => {
                stop.send_replace(Some(Stop::Closing));
                tokio::time::timeout(STOP_GRACE, looking).await.unwrap_or(Err(Stop::Closing.into()))
            }
        }
    }

    fn url(&self, step: u64) -> String {
        self.store.url(&step_folder(step))
    }

    fn give_up(&self, Awaited { attempt, .. }: Awaited, missing: Vec<u32>) {
        let url = self.url(attempt.step);
        self.tell(Outcome::Incomplete { step: attempt.step, url, missing });
    }

    /// Saves, or gives up when there is a reason to.
    async fn save(&mut self, snapshot: &Snapshot, incoming: &watch::Receiver<Inbox>) -> Outcome {
        let begun = Instant::now();
        let (stop, stopped) = watch::channel(None);
        let (progress, progressed) = watch::channel(0);
        let control = Control { stop: stopped, progress };
        let done = {
            let saving = self.save_and_retain(snapshot, begun, &control);
            tokio::pin!(saving);
            tokio::select! {
                biased;
                done = &mut saving => done,
                reason = self.reason_to_stop(incoming.clone(), progressed) => {
                    stop.send_replace(Some(reason));
                    tokio::time::timeout(STOP_GRACE, saving).await.unwrap_or(Err(reason.into()))
                }
            }
        };
        if let (Ok(Outcome::Written { .. }), 0) = (&done, snapshot.share.index) {
            self.awaited.push(Awaited { attempt: snapshot.attempt(), begun, written: Instant::now() });
        }
        if let Ok(Outcome::Saved(saved)) = &done {
            self.give_up_before(saved.step);
        }
        let (step, url) = (snapshot.step, self.url(snapshot.step));
        done.unwrap_or_else(|error| Outcome::Failed { step, url, error })
    }

    async fn save_and_retain(
        &self,
        snapshot: &Snapshot,
        begun: Instant,
        control: &Control,
    ) -> Result<Outcome, SaveError> {
        let (step, share) = (snapshot.step, snapshot.share);
        let (bytes, complete) = match save(&self.store, snapshot, &self.tuning, control).await? {
            Written::Complete(bytes) => (bytes, true),
            Written::Share(bytes) => (bytes, false),
        };
        match complete && share.index == 0 {
            true => Ok(Outcome::Saved(self.saved(&snapshot.attempt(), begun, bytes, control).await)),
            false => Ok(Outcome::Written { step, share, bytes, took: begun.elapsed() }),
        }
    }

    /// A checkpoint is complete: removes what it makes superfluous.
    async fn saved(&self, attempt: &Attempt, begun: Instant, bytes: u64, control: &Control) -> Saved {
        let (step, took) = (attempt.step, begun.elapsed());
        let (removed, not_removed) = match control.race(retain(&self.store, self.retention, step)).await {
            Ok(Ok(removed)) => (removed, None),
            Ok(Err(error)) => (Vec::new(), Some(error.into())),
            Err(stop) => (Vec::new(), Some(stop.into())),
        };
        Saved { step, url: self.url(step), bytes, took, removed, not_removed }
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

/// Whether what went wrong may be over when it is looked at again.
fn is_worth_waiting(error: &SaveError) -> bool {
    matches!(error, SaveError::Store(error) if error.is_transient()) || matches!(error, SaveError::Stopped(_))
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
