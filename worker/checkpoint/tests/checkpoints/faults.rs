//! A fault at every write point in turn: a complete checkpoint always loads, and nothing half is taken for whole.

use std::sync::Arc;

use mattock_checkpoint::{Location, Outcome, SaveError, Which, list, load, verify};
use object_store::ObjectStore;
use object_store::memory::InMemory;

use crate::faulty::{Fault, Faulty};
use crate::samples::{assert_is, keep, layout, must_save, save};

/// Saves step 2 over a store with step 1, with the fault at the first write, the second, and so on until there
/// is none left; the oldest is removed by then, so that removals are write points too.
fn at_every_write_point(fault: Fault, check: fn(&Outcome, &Location, newest: u64)) {
    for at in 1.. {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let location = Location::given("memory://sound", Arc::clone(&store));
        must_save(&location, 1, keep(1));
        let (faulty, _) = Faulty::over(store, fault.clone(), at);
        let outcome = save(&faulty.location(), 2, keep(1));
        let (loaded, _) = load(&location, Which::Newest, &layout()).unwrap();
        let newest = loaded.head.manifest.step;
        assert_is(&loaded, newest);
        assert!(is_saved(&outcome) <= (newest == 2), "{fault:?} at write {at}: {outcome:?}");
        for summary in list(&location).unwrap().complete {
            let verdicts = verify(&location, Some(summary.step)).unwrap();
            assert_eq!(verdicts[0].flaws, [], "{fault:?} at write {at}: listed as complete");
        }
        check(&outcome, &location, newest);
        if !faulty.happened() {
            assert!(at > 20, "{at} write points are too few to be true");
            return;
        }
    }
}

fn is_saved(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Saved(_))
}

#[test]
fn a_busy_moment_is_waited_out() {
    at_every_write_point(Fault::Busy, |outcome, _, newest| {
        assert!(is_saved(outcome) && newest == 2, "{outcome:?}");
    });
}

/// The manifest's create-only put included: its writer knows it by the nonce.
#[test]
fn a_lost_reply_changes_nothing() {
    at_every_write_point(Fault::LostReply, |outcome, _, newest| {
        assert!(is_saved(outcome) && newest == 2, "{outcome:?}");
    });
}

/// What an S3 client makes of a lost reply to the completion of an upload.
#[test]
fn an_upload_that_was_completed_unheard_is_repeated() {
    at_every_write_point(Fault::ForgetsUpload, |outcome, _, newest| {
        assert!(is_saved(outcome) && newest == 2, "{outcome:?}");
    });
}

#[test]
fn a_store_that_keeps_half_is_found_out_before_the_manifest() {
    at_every_write_point(Fault::Truncates, |outcome, location, newest| {
        assert_eq!(is_saved(outcome), newest == 2, "{outcome:?}");
        if let Outcome::Failed { error, .. } = outcome {
            assert!(matches!(error, SaveError::Lost { .. }), "{error}");
            assert_eq!(list(location).unwrap().unusable, [], "nothing is left behind");
        }
    });
}

#[test]
fn a_full_disk_is_named_and_costs_no_checkpoint() {
    at_every_write_point(Fault::Full, |outcome, _, newest| match outcome {
        Outcome::Saved(saved) => assert_eq!(newest, saved.step),
        Outcome::Failed { error, .. } => {
            assert_eq!(newest, 1);
            assert!(error.to_string().contains("free some space"), "{error}");
        }
        Outcome::Superseded { .. } => unreachable!(),
        other => panic!("{other:?}"),
    });
}

#[test]
fn a_writer_killed_before_any_write_costs_no_checkpoint() {
    at_every_write_point(Fault::Dead, |_, _, _| {});
}

#[test]
fn a_writer_killed_after_any_write_costs_no_checkpoint() {
    at_every_write_point(Fault::DeadAfter, |_, _, _| {});
}

/// Whatever a killed writer left, the next one writes the same step.
#[test]
fn the_step_of_a_killed_writer_can_be_written_again() {
    for at in 1..=25 {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let location = Location::given("memory://sound", Arc::clone(&store));
        must_save(&location, 1, keep(2));
        save(&Faulty::over(store, Fault::DeadAfter, at).0.location(), 2, keep(2));
        must_save(&location, 2, keep(2));
        assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 2);
    }
}
