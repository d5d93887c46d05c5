//! How many may be at the door and inside, and how often it is said that somebody was turned away: all bounded.
//!
//! Whoever reaches the port can open connections and say nothing. So strangers' places are few, and the one that has been
//! there longest gives way to the next: a worker needs its place for a few round trips only, and whoever would keep it out
//! must open as many connections as there are places within those. Once half of the places are taken, a caller must also
//! show that it receives what is sent to its address.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;

use crate::event::Event;
use crate::ids::WorkerId;

/// Events of refused strangers within a timeout; what is beyond is counted.
const REFUSALS_MAX: u32 = 100;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The places of those who have not said yet who they are.
#[derive(Debug)]
pub(super) struct Strangers {
    places_max: usize,
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    next: u64,
    /// In the order of arrival; dropping a sender displaces the stranger.
    taken: BTreeMap<u64, oneshot::Sender<()>>,
}

impl Strangers {
    pub(super) fn new(places_max: usize) -> Arc<Self> {
        Arc::new(Self { places_max, places: Mutex::default() })
    }

    /// Whether so many are here that a caller's address must be proved.
    pub(super) fn crowded(&self) -> bool {
        lock(&self.places).taken.len() >= self.places_max / 2
    }

    /// Takes a place, that of the oldest stranger if there is no other.
    pub(super) fn enter(self: &Arc<Self>) -> Stranger {
        let mut places = lock(&self.places);
        if places.taken.len() >= self.places_max {
            drop(places.taken.pop_first());
        }
        let number = places.next;
        places.next += 1;
        let (place, displaced) = oneshot::channel();
        places.taken.insert(number, place);
        Stranger { number, displaced, strangers: Arc::clone(self) }
    }
}

/// One who has not said yet who he is.
#[derive(Debug)]
pub(super) struct Stranger {
    number: u64,
    displaced: oneshot::Receiver<()>,
    strangers: Arc<Strangers>,
}

impl Stranger {
    /// Completes when a newer one needs the place.
    pub(super) async fn displaced(&mut self) {
        // Nobody sends anything: the sender is dropped.
        let _ = (&mut self.displaced).await;
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        lock(&self.strangers.places).taken.remove(&self.number);
    }
}

/// Workers that are connected: each once.
#[derive(Debug)]
pub(super) struct Inside {
    workers_max: usize,
    workers: Mutex<BTreeSet<WorkerId>>,
    /// A seat is free again.
    left: Notify,
}

impl Inside {
    pub(super) fn new(workers_max: usize) -> Arc<Self> {
        Arc::new(Self { workers_max, workers: Mutex::default(), left: Notify::new() })
    }

    /// Lets a worker in that is back; where its last connection has not ended yet, once it has, for so long at most.
    pub(super) async fn enter_again(
        self: &Arc<Self>,
        worker: WorkerId,
        patience: Duration,
    ) -> Result<Seat, String> {
        let free = async {
            loop {
                let left = self.left.notified();
                tokio::pin!(left);
                // Before looking, so that no leave is missed.
                left.as_mut().enable();
                if !lock(&self.workers).contains(&worker) {
                    return;
                }
                left.await;
            }
        };
        // Whether it is: that is looked at next.
        let _ = timeout(patience, free).await;
        self.enter(worker)
    }

    /// Lets a worker in, or says why not.
    pub(super) fn enter(self: &Arc<Self>, worker: WorkerId) -> Result<Seat, String> {
        let mut workers = lock(&self.workers);
        if workers.len() >= self.workers_max {
            return Err(format!("{} workers are connected already: no more are taken", workers.len()));
        }
        if !workers.insert(worker) {
            return Err(format!("{worker} is connected already: a certificate is for one process"));
        }
        Ok(Seat { worker, inside: Arc::clone(self) })
    }
}

/// A connected worker's.
#[derive(Debug)]
pub(super) struct Seat {
    worker: WorkerId,
    inside: Arc<Inside>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.inside.workers).remove(&self.worker);
        self.inside.left.notify_waiters();
    }
}

/// Says who was turned away and why: never waits, and not more often than somebody can read.
#[derive(Debug)]
pub(super) struct Refusals {
    events: mpsc::Sender<Event>,
    window: Duration,
    state: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    said: u32,
    kept: u64,
}

impl Refusals {
    pub(super) fn new(events: mpsc::Sender<Event>, window: Duration) -> Self {
        let state = Mutex::new(Window { since: Instant::now(), said: 0, kept: 0 });
        Self { events, window, state }
    }

    pub(super) fn tell(&self, reason: String) {
        tracing::info!(%reason, "refused");
        let mut state = lock(&self.state);
        if state.since.elapsed() >= self.window {
            (state.since, state.said) = (Instant::now(), 0);
        }
        if state.said >= REFUSALS_MAX {
            state.kept += 1;
            return;
        }
        let more = if state.kept > 0 { format!(" ({} more before it)", state.kept) } else { String::new() };
        // Those who read events may be behind: then this one is counted too.
        match self.events.try_send(Event::WorkerRefused { reason: reason + &more }) {
            Ok(()) => (state.said, state.kept) = (state.said + 1, 0),
            Err(_) => state.kept += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_stranger_gives_way() {
        let strangers = Strangers::new(2);
        let mut first = strangers.enter();
        assert!(strangers.crowded());
        let (mut second, third) = (strangers.enter(), strangers.enter());
        first.displaced().await;
        drop(third);
        // A place is free again, so nobody has to go.
        let _fourth = strangers.enter();
        tokio::select! {
            biased;
            () = second.displaced() => panic!("there was a place"),
            () = std::future::ready(()) => {}
        }
    }

    #[test]
    fn a_worker_is_inside_once_and_may_come_back() {
        let inside = Inside::new(2);
        let seat = inside.enter(WorkerId(1)).unwrap();
        assert!(inside.enter(WorkerId(1)).unwrap_err().contains("already"));
        drop(seat);
        let _seats = [inside.enter(WorkerId(1)).unwrap(), inside.enter(WorkerId(2)).unwrap()];
        assert!(inside.enter(WorkerId(3)).is_err());
    }

    #[tokio::test]
    async fn who_is_back_waits_for_the_end_of_its_last_connection() {
        let inside = Inside::new(2);
        let seat = inside.enter(WorkerId(1)).unwrap();
        let refused = inside.enter_again(WorkerId(1), Duration::from_millis(1)).await;
        assert!(refused.unwrap_err().contains("already"));
        let again = Arc::clone(&inside);
        let waiting =
            tokio::spawn(async move { again.enter_again(WorkerId(1), Duration::from_secs(3600)).await });
        tokio::task::yield_now().await;
        drop(seat);
        assert!(waiting.await.unwrap().is_ok());
        assert!(inside.enter_again(WorkerId(1), Duration::from_secs(3600)).await.is_ok(), "it is free");
    }

    #[test]
    fn refusals_are_told_up_to_a_number_and_counted_beyond() {
        let (events, mut told) = mpsc::channel(1000);
        let refusals = Refusals::new(events, Duration::from_secs(3600));
        (0..REFUSALS_MAX + 7).for_each(|i| refusals.tell(format!("caller {i}")));
        let heard = std::iter::from_fn(|| told.try_recv().ok()).count();
        assert_eq!(heard, REFUSALS_MAX as usize);
        lock(&refusals.state).said = 0;
        refusals.tell("one more".to_owned());
        let reason = "one more (7 more before it)".to_owned();
        assert_eq!(told.try_recv(), Ok(Event::WorkerRefused { reason }));
    }

    #[test]
    fn refusals_wait_for_nobody() {
        let (events, mut told) = mpsc::channel(1);
        let refusals = Refusals::new(events, Duration::from_secs(3600));
        (0..3).for_each(|i| refusals.tell(format!("caller {i}")));
        told.try_recv().unwrap();
        refusals.tell("last".to_owned());
        assert_eq!(
            told.try_recv(),
            Ok(Event::WorkerRefused { reason: "last (2 more before it)".to_owned() })
        );
    }
}
