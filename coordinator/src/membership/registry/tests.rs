//! The registry, event by event.

use super::*;
use crate::protocol::{Blame, Break, Failure};

mod arrivals;
mod changes;
mod ends;
mod hangs;
mod quarantine;
mod returns;
mod scaling;

const TIMEOUT: Duration = Duration::from_secs(10);

/// A registry, and how far its clock is.
struct Run {
    registry: Registry,
    now: Instant,
}

impl Run {
    fn new(expected: u32, max_workers: u32) -> Self {
        Self::with_minimum(1, expected, max_workers)
    }

    fn with_minimum(min_workers: u32, expected: u32, max_workers: u32) -> Self {
        let (micro_batches, timeout, mixed, divided) = (8, TIMEOUT, false, false);
        let config = Config { micro_batches, expected, min_workers, max_workers, timeout, mixed, divided };
        let now = Instant::now();
        Self { registry: Registry::new(config, now), now }
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.registry.step(self.now, event, &mut actions);
        actions
    }

    fn join(&mut self, id: u64) -> Vec<Action> {
        let candidate = Candidate { address: format!("address {id}"), fingerprint: "one".into() };
        self.step(Event::Joined(WorkerId(id), candidate))
    }

    fn ready(&mut self, id: u64, step: Option<u64>) -> Vec<Action> {
        self.step(Event::Ready(WorkerId(id), step))
    }

    fn linked(&mut self, id: u64) -> Vec<Action> {
        self.step(Event::Linked(WorkerId(id), self.registry.generation))
    }

    /// The answer to the newest recall.
    fn held(&mut self, id: u64, holding: Holding) -> Vec<Action> {
        self.step(Event::Held(WorkerId(id), self.registry.generation, holding))
    }

    fn lost(&mut self, id: u64) -> Vec<Action> {
        self.step(Event::Lost(WorkerId(id), "killed".into()))
    }

    /// A worker says that the ring does not hold.
    fn broken(&mut self, id: u64, lost_rank: Option<u32>) -> Vec<Action> {
        let generation = self.registry.generation;
        let text = "it broke".to_owned();
        self.step(Event::Broken(WorkerId(id), Break { generation, lost_rank, text }))
    }

    fn leaving(&mut self, id: u64) -> Vec<Action> {
        self.step(Event::Leaving(WorkerId(id), "told to".into()))
    }

    fn phase(&self) -> Phase {
        self.registry.phase()
    }

    /// Two workers that train, and a third may come; what was decided on the way is thrown away.
    fn training() -> Self {
        Self::train(1, 2)
    }

    /// As many, of which so many must stay; one more may come.
    fn train(min_workers: u32, workers: u32) -> Self {
        let mut run = Self::with_minimum(min_workers, workers, workers + 1);
        let ids = 0..u64::from(workers);
        ids.clone().for_each(|id| drop(run.join(id)));
        ids.clone().for_each(|id| drop(run.ready(id, Some(0))));
        ids.for_each(|id| drop(run.linked(id)));
        assert_eq!(run.phase(), Phase::Running);
        run
    }
}

fn finish(state_hash: u64, held_out_loss: Option<f64>) -> Finish {
    let (step, completed, unigram_loss, parameters) = (8, true, None, 1);
    Finish { step, completed, state_hash, held_out_loss, unigram_loss, parameters }
}

fn holding(step: u64, done: &[u32], running: Option<u32>) -> Holding {
    Holding { step: Some(step), done: done.to_vec(), running, ..Holding::default() }
}

/// Workers, by rank, with their shares of the first step.
type Shares = Vec<(u64, Vec<u32>)>;

/// The ring that these actions form: generation, step, source, and shares.
fn formed(actions: &[Action]) -> (u64, u64, Option<u32>, Shares) {
    let form = actions.iter().find_map(|action| match action {
        Action::Form(formation) => Some(formation),
        _ => None,
    });
    let Formation { generation, step, source, places } = form.unwrap_or_else(|| panic!("{actions:?}"));
    let places = places.iter().map(|place| (place.worker.0, place.first.clone()));
    (*generation, *step, *source, places.collect())
}

/// Whom these actions recall, and why.
fn recalled(actions: &[Action]) -> (Vec<u64>, String) {
    let recall = actions.iter().find_map(|action| match action {
        Action::Recall { members, reason, .. } => Some((members, reason)),
        _ => None,
    });
    let (members, reason) = recall.unwrap_or_else(|| panic!("{actions:?}"));
    (members.iter().map(|worker| worker.0).collect(), reason.clone())
}

/// The outcome, and the reason.
fn end(actions: &[Action]) -> (Outcome, String) {
    match actions.last() {
        Some(Action::End(outcome, reason)) => (outcome.clone(), reason.clone()),
        other => panic!("no end: {other:?}"),
    }
}

#[test]
fn a_run_starts_with_as_many_as_it_admits() {
    let mut run = Run::new(3, 2);
    assert_eq!(run.join(0), [Action::Admit(WorkerId(0))]);
    assert_eq!(run.join(1), [Action::Admit(WorkerId(1))]);
    assert!(matches!(run.join(2)[..], [Action::Refuse(WorkerId(2), _)]));
    assert_eq!(run.ready(0, Some(0)), []);
    let first = formed(&run.ready(1, Some(0)));
    assert_eq!(first, (1, 0, None, vec![(0, vec![0, 1, 2, 3]), (1, vec![4, 5, 6, 7])]));
}

#[test]
fn who_joins_twice_is_let_in_once() {
    let mut run = Run::new(2, 2);
    run.join(0);
    assert_eq!(run.join(0), []);
}

#[test]
fn another_fingerprint_is_refused() {
    let mut run = Run::training();
    let candidate = Candidate { address: String::new(), fingerprint: "two".into() };
    let refused = run.step(Event::Joined(WorkerId(7), candidate));
    assert!(matches!(&refused[..], [Action::Refuse(_, reason)] if reason.contains("use one binary")));
}

#[test]
fn a_stop_is_passed_on_once_and_at_once() {
    let mut run = Run::training();
    assert_eq!(run.step(Event::StopRequested), [Action::Stop]);
    assert_eq!(run.step(Event::StopRequested), []);
}

#[test]
fn a_stop_while_a_ring_forms_comes_with_the_start_too() {
    let mut run = Run::new(1, 1);
    run.join(0);
    run.ready(0, Some(0));
    assert_eq!(run.step(Event::StopRequested), [Action::Stop]);
    let actions = run.linked(0);
    assert!(matches!(actions[..], [Action::Start(_), Action::Stop]), "{actions:?}");
}

#[test]
fn what_is_shown_is_what_there_is() {
    let mut run = Run::training();
    let formation = run.registry.formation().unwrap();
    assert_eq!(
        formation.places.iter().map(|place| place.worker).collect::<Vec<_>>(),
        [WorkerId(0), WorkerId(1)]
    );
    run.now += TIMEOUT / 4;
    run.step(Event::Heard(WorkerId(1)));
    let heard: Vec<_> = run.registry.workers().collect();
    assert_eq!(heard, [(WorkerId(0), TIMEOUT / 4), (WorkerId(1), Duration::ZERO)]);
}
