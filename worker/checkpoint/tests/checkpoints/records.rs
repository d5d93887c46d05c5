//! Numbered records: what every store does alike, and stores that cannot decide between two writers.

use std::sync::Arc;

use mattock_checkpoint::{Location, RecordError, Records};
use object_store::memory::InMemory;

use crate::contract::over_every_store;
use crate::faulty::{Fault, Faulty};

fn records(location: &Location) -> Records {
    Records::new(location.clone(), "lease")
}

fn faulty(fault: Fault) -> Records {
    let (store, _) = Faulty::over(Arc::new(InMemory::new()), fault, 1);
    records(&store.location())
}

#[test]
fn of_two_writers_of_a_number_one_wins_and_the_highest_is_found() {
    over_every_store("records", |location| {
        let records = records(location);
        records.probe().unwrap();
        assert_eq!(records.newest(0).unwrap(), None);
        assert!(records.create(1, b"one").unwrap());
        assert!(records.create(1, b"one").unwrap(), "asked again, it is still ours");
        assert!(!records.create(1, b"other").unwrap());
        assert!(records.create(12, b"twelve").unwrap());
        assert_eq!(records.newest(0).unwrap(), Some((12, b"twelve".to_vec())));
        assert_eq!(records.newest(11).unwrap(), Some((12, b"twelve".to_vec())));
        assert_eq!(records.newest(12).unwrap(), None);
        assert_eq!(records.read(1).unwrap(), Some(b"one".to_vec()));
        assert_eq!(records.read(2).unwrap(), None);
    });
}

#[test]
fn a_store_that_ignores_the_condition_is_refused_with_what_to_do() {
    let refused = faulty(Fault::Unconditional).probe().unwrap_err();
    assert!(matches!(refused, RecordError::Unconditional { .. }), "{refused}");
    assert!(refused.to_string().contains("If-None-Match"), "{refused}");
}

#[test]
fn a_reply_that_is_lost_is_no_defeat() {
    assert!(faulty(Fault::AsksTwice).create(1, b"ours").unwrap());
}

#[test]
fn what_is_looked_for_where_nothing_is_makes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location::parse(folder.path().join("none").to_str().unwrap()).unwrap();
    assert_eq!(records(&location).newest(0).unwrap(), None);
    assert_eq!(records(&location).read(1).unwrap(), None);
    assert!(!folder.path().join("none").exists());
}
