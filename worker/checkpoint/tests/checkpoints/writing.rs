//! The background writer: what supersedes what, and how it ends. Nothing here depends on time: stores hang for good
//! or wait until they are let on.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use mattock_checkpoint::{Location, Outcome, SaveError, Slices, Stop, Tuning, Which, Writer, list, load};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use tokio::sync::Semaphore;

use crate::faulty::{Fault, Faulty};
use crate::samples::{PATIENCE, assert_is, keep, layout, must_save, snapshot, tuning};

fn sound() -> (Arc<dyn ObjectStore>, Location) {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    (Arc::clone(&store), Location::given("memory://sound", store))
}

fn steps_saved(outcomes: &[Outcome]) -> Vec<u64> {
    let saved = |outcome: &Outcome| match outcome {
        Outcome::Saved(saved) => Some(saved.step),
        _ => None,
    };
    outcomes.iter().filter_map(saved).collect()
}

#[test]
fn a_waiting_snapshot_is_superseded_and_one_under_way_is_finished() {
    let gate = Arc::new(Semaphore::new(0));
    let (store, location) = sound();
    let (faulty, reached) = Faulty::over(store, Fault::Gate(Arc::clone(&gate)), 5);
    let mut writer = Writer::start(&faulty.location(), keep(9), tuning()).unwrap();
    writer.submit(snapshot(1)).unwrap();
    reached.recv().unwrap();
    writer.submit(snapshot(2)).unwrap();
    writer.submit(snapshot(3)).unwrap();
    let early = writer.poll_outcomes();
    assert!(matches!(early[..], [Outcome::Superseded { step: 2, by: 3 }]), "{early:?}");
    gate.add_permits(1);
    assert_eq!(steps_saved(&writer.finish(PATIENCE).unwrap()), [1, 3]);
    assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 3);
}

/// At every write point: a store that stops answering costs the checkpoint under way, not the newer one.
#[test]
fn a_save_that_stalls_gives_way_to_a_newer_one_and_leaves_nothing() {
    for at in 1.. {
        let (store, location) = sound();
        let (faulty, reached) = Faulty::over(store, Fault::Hangs, at);
        let tuning = Tuning { stall: Duration::from_millis(1), ..tuning() };
        let mut writer = Writer::start(&faulty.location(), keep(1), tuning).unwrap();
        writer.submit(snapshot(1)).unwrap();
        if !comes_to_it(&mut writer, &reached) {
            assert!(at > 15, "only {at} write points");
            return;
        }
        writer.submit(snapshot(2)).unwrap();
        let outcomes = writer.finish(PATIENCE).unwrap();
        let [Outcome::Failed { step: 1, error, .. }, Outcome::Saved(_)] = &outcomes[..] else {
            panic!("{outcomes:?}")
        };
        assert!(matches!(error, SaveError::Stopped(Stop::Newer { by: 2 })), "{error}");
        let listing = list(&location).unwrap();
        assert_eq!((listing.complete.len(), listing.unusable), (1, Vec::new()), "nothing of step 1 is left");
    }
}

/// Waits until the fault happens, or the save is done without.
fn comes_to_it(writer: &mut Writer, reached: &mpsc::Receiver<()>) -> bool {
    loop {
        if reached.recv_timeout(Duration::from_millis(1)).is_ok() {
            return true;
        }
        if !writer.poll_outcomes().is_empty() {
            return false;
        }
    }
}

#[test]
fn finishing_gives_up_a_store_that_does_not_answer() {
    let (store, location) = sound();
    must_save(&location, 1, keep(3));
    let (faulty, reached) = Faulty::over(store, Fault::Hangs, 6);
    let mut writer = Writer::start(&faulty.location(), keep(3), tuning()).unwrap();
    writer.submit(snapshot(2)).unwrap();
    reached.recv().unwrap();
    let error = writer.finish(Duration::ZERO).unwrap_err();
    assert_eq!(error.step, 2);
    assert!(matches!(error.outcomes[..], [Outcome::Failed { error: SaveError::Stopped(Stop::Closing), .. }]));
    let listing = list(&location).unwrap();
    assert_eq!((listing.complete.len(), listing.unusable), (1, Vec::new()));
}

#[test]
fn a_save_ends_at_its_deadline() {
    let (faulty, _) = Faulty::over(sound().0, Fault::Hangs, 3);
    let deadline = Duration::from_millis(1);
    let mut writer = Writer::start(&faulty.location(), keep(3), Tuning { deadline, ..tuning() }).unwrap();
    writer.submit(snapshot(1)).unwrap();
    let error = writer.finish(PATIENCE).unwrap_err();
    assert!(matches!(
        error.outcomes[..],
        [Outcome::Failed { error: SaveError::Stopped(Stop::Deadline(_)), .. }]
    ));
}

/// A failed checkpoint does not end the run, and a later good one settles it.
#[test]
fn the_writer_goes_on_after_a_failure() {
    let (faulty, _) = Faulty::over(sound().0, Fault::Truncates, 1);
    let mut writer = Writer::start(&faulty.location(), keep(3), tuning()).unwrap();
    writer.submit(snapshot(1)).unwrap();
    let mut outcomes = Vec::new();
    while outcomes.is_empty() {
        outcomes = writer.poll_outcomes();
    }
    assert!(matches!(outcomes[..], [Outcome::Failed { step: 1, .. }]));
    writer.submit(snapshot(2)).unwrap();
    assert_eq!(steps_saved(&writer.finish(PATIENCE).unwrap()), [2]);
}

#[test]
fn a_writer_without_work_finishes_at_once() {
    let writer = Writer::start(&sound().1, keep(3), tuning()).unwrap();
    assert!(writer.finish(PATIENCE).unwrap().is_empty());
}

#[test]
fn arrays_that_do_not_fit_the_layout_are_refused_on_submission() {
    let mut writer = Writer::start(&sound().1, keep(3), tuning()).unwrap();
    let short = mattock_checkpoint::Snapshot { m: Slices::whole(Arc::new(vec![0.0; 39])), ..snapshot(1) };
    assert_eq!(writer.submit(short).unwrap_err().array, "m");
    assert!(writer.finish(PATIENCE).unwrap().is_empty());
}
