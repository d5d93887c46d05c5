//! The registry, event by event.

use super::*;

const TIMEOUT: Duration = Duration::from_secs(10);

/// A registry, and how far its clock is.
struct Run {
    registry: Registry,
    now: Instant,
}

impl Run {
    fn new(expected: u32, max_workers: u32) -> Self {
        let config = Config { micro_batches: 8, expected, max_workers, timeout: TIMEOUT, mixed: false };
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

    /// Two workers that train; what was decided on the way is thrown away.
    fn training() -> Self {
        Self::train(2)
    }

    /// As many.
    fn train(workers: u32) -> Self {
        let mut run = Self::new(workers, workers);
        let ids = 0..u64::from(workers);
        ids.clone().for_each(|id| drop(run.join(id)));
        ids.clone().for_each(|id| drop(run.step(Event::Ready(WorkerId(id), 0))));
        ids.for_each(|id| drop(run.step(Event::Linked(WorkerId(id), 1))));
        assert_eq!(run.registry.phase(), Phase::Running);
        run
    }
}

fn finish(state_hash: u64, held_out_loss: Option<f64>) -> Finish {
    let (step, completed, unigram_loss, parameters) = (8, true, None, 1);
    Finish { step, completed, state_hash, held_out_loss, unigram_loss, parameters }
}

#[test]
fn a_run_starts_with_as_many_as_it_admits() {
    let mut run = Run::new(3, 2);
    assert_eq!(run.join(0), [Action::Admit(WorkerId(0))]);
    assert_eq!(run.join(1), [Action::Admit(WorkerId(1))]);
    assert!(matches!(run.join(2)[..], [Action::Refuse(WorkerId(2), _)]));
    assert_eq!(run.step(Event::Ready(WorkerId(0), 0)), []);
    assert!(matches!(run.step(Event::Ready(WorkerId(1), 0))[..], [Action::Form(_)]));
}

#[test]
fn who_is_done_may_be_silent_and_sets_no_timer() {
    let mut run = Run::training();
    run.step(Event::Finished(WorkerId(0), finish(7, None)));
    run.now += TIMEOUT / 2;
    run.step(Event::Heard(WorkerId(1)));
    assert_eq!(run.registry.deadline(), Some(run.now + TIMEOUT));
    run.now += TIMEOUT - Duration::from_nanos(1);
    assert_eq!(run.step(Event::Tick), []);
    assert_eq!(run.step(Event::Lost(WorkerId(0), "it has left".into())), []);
    let end = run.step(Event::Finished(WorkerId(1), finish(7, Some(0.5))));
    assert_eq!(end, [Action::End(Outcome::Completed(finish(7, Some(0.5))), "all steps are done".into())]);
}

#[test]
fn nobody_is_done_before_training() {
    let mut run = Run::new(1, 1);
    run.join(0);
    run.step(Event::Finished(WorkerId(0), finish(7, None)));
    run.now += TIMEOUT;
    assert!(matches!(run.step(Event::Tick)[..], [Action::End(Outcome::WorkerLost(WorkerId(0)), _)]));
}

fn lost(rank: u32) -> Failure {
    Failure { text: format!("rank {rank} was lost"), bad_input: false, lost_rank: Some(rank) }
}

#[test]
fn who_is_called_lost_may_speak_for_itself() {
    let mut run = Run::training();
    assert_eq!(run.step(Event::Failed(WorkerId(1), lost(0))), []);
    run.now += TIMEOUT / HEARING - Duration::from_nanos(1);
    let own = Failure { text: "the disk is full".into(), bad_input: true, lost_rank: None };
    let end = Action::End(Outcome::BadInput, "worker 0: the disk is full".into());
    assert_eq!(run.step(Event::Failed(WorkerId(0), own)), [end]);
}

#[test]
fn who_does_not_speak_is_lost() {
    let mut run = Run::training();
    assert_eq!(run.step(Event::Failed(WorkerId(1), lost(0))), []);
    run.now += TIMEOUT / HEARING;
    assert_eq!(run.registry.deadline(), Some(run.now), "the hearing ends by itself");
    let end = Action::End(Outcome::WorkerLost(WorkerId(0)), "worker 1: rank 0 was lost".into());
    assert_eq!(run.step(Event::Tick), [end]);
}

#[test]
fn who_left_because_of_another_is_not_the_one_that_was_lost() {
    let mut run = Run::train(4);
    // Rank 2 dies; 1 and 3 leave because of it, and 0 because of them.
    for (worker, rank) in [(0, 1), (1, 2), (3, 2)] {
        assert_eq!(run.step(Event::Failed(WorkerId(worker), lost(rank))), []);
    }
    run.now += TIMEOUT / HEARING;
    let end = Action::End(Outcome::WorkerLost(WorkerId(2)), "worker 1: rank 2 was lost".into());
    assert_eq!(run.step(Event::Tick), [end]);
}

#[test]
fn two_that_accuse_each_other_end_the_run_too() {
    let mut run = Run::training();
    run.step(Event::Failed(WorkerId(0), lost(1)));
    run.step(Event::Failed(WorkerId(1), lost(0)));
    run.now += TIMEOUT / HEARING;
    let end = Action::End(Outcome::WorkerLost(WorkerId(0)), "worker 1: rank 0 was lost".into());
    assert_eq!(run.step(Event::Tick), [end]);
}

#[test]
fn a_confirmed_death_ends_the_hearing() {
    let mut run = Run::training();
    run.step(Event::Failed(WorkerId(1), lost(0)));
    let end = run.step(Event::Lost(WorkerId(0), "killed".into()));
    let reason = "worker 0 was lost in generation 1: killed".to_owned();
    assert_eq!(end, [Action::End(Outcome::WorkerLost(WorkerId(0)), reason)]);
}

#[test]
fn who_calls_itself_lost_or_somebody_who_is_not_there_has_failed() {
    for rank in [1, 9] {
        let mut run = Run::training();
        let end = run.step(Event::Failed(WorkerId(1), lost(rank)));
        assert_eq!(end, [Action::End(Outcome::Failed, format!("worker 1: rank {rank} was lost"))]);
    }
}

#[test]
fn a_stop_is_passed_on_once_and_at_once() {
    let mut run = Run::training();
    assert_eq!(run.step(Event::StopRequested), [Action::Stop]);
    assert_eq!(run.step(Event::StopRequested), []);
}

#[test]
fn a_stop_while_workers_gather_ends_the_run() {
    let end = Action::End(Outcome::Failed, "stopped before training began".into());
    assert_eq!(Run::new(1, 1).step(Event::StopRequested), [end]);
}

#[test]
fn a_stop_while_a_ring_forms_comes_with_the_start_too() {
    let mut run = Run::new(1, 1);
    run.join(0);
    run.step(Event::Ready(WorkerId(0), 0));
    assert_eq!(run.step(Event::StopRequested), [Action::Stop]);
    let actions = run.step(Event::Linked(WorkerId(0), 1));
    assert!(matches!(actions[..], [Action::Start(_), Action::Stop]), "{actions:?}");
}

#[test]
fn a_process_that_ends_before_it_joins_ends_a_run_that_waits_for_it() {
    for (bad_input, outcome) in [(true, Outcome::BadInput), (false, Outcome::Failed)] {
        let abandoned = || Event::Abandoned { cause: "exit status 2".into(), bad_input };
        let reason = "a worker ended before it joined: exit status 2".to_owned();
        assert_eq!(Run::new(2, 2).step(abandoned()), [Action::End(outcome, reason)]);
        assert_eq!(Run::training().step(abandoned()), [], "a run that has its workers goes on");
    }
}

#[test]
fn workers_that_start_from_different_steps_do_not_form_a_ring() {
    let mut run = Run::new(2, 2);
    run.join(0);
    run.join(1);
    run.step(Event::Ready(WorkerId(0), 3));
    let end = run.step(Event::Ready(WorkerId(1), 4));
    let [Action::End(Outcome::Failed, reason)] = &end[..] else { panic!("{end:?}") };
    assert!(reason.contains("different steps {3, 4}"), "{reason}");
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
