//! One run per location.

use mattock_checkpoint::{ClaimError, How, claim, list};

use crate::contract::over_every_store;
use crate::samples::{keep, must_save};

#[test]
fn a_location_belongs_to_the_run_that_came_first() {
    over_every_store("first", |location| {
        assert_eq!(claim(location, "one", How::Fresh).unwrap(), "one");
        must_save(location, 4, keep(1));
        let error = claim(location, "two", How::Fresh).unwrap_err();
        assert!(matches!(&error, ClaimError::Taken { holder, newest: Some(4), .. } if holder == "one"));
        let text = error.to_string();
        assert!(text.contains("--resume") && text.contains("--overwrite"), "{text}");
    });
}

#[test]
fn resuming_goes_on_with_the_run_that_is_there() {
    over_every_store("resume", |location| {
        assert!(matches!(claim(location, "two", How::Resume), Err(ClaimError::Nothing { .. })));
        claim(location, "one", How::Fresh).unwrap();
        assert_eq!(claim(location, "two", How::Resume).unwrap(), "one");
    });
}

#[test]
fn overwriting_removes_every_checkpoint_and_takes_over() {
    over_every_store("overwrite", |location| {
        claim(location, "one", How::Fresh).unwrap();
        must_save(location, 1, keep(2));
        must_save(location, 2, keep(2));
        assert_eq!(claim(location, "two", How::Overwrite).unwrap(), "two");
        assert_eq!(list(location).unwrap(), Default::default());
        assert_eq!(claim(location, "three", How::Resume).unwrap(), "two");
    });
}

#[test]
fn checkpoints_without_a_record_are_not_overwritten_by_accident() {
    over_every_store("no-record", |location| {
        must_save(location, 1, keep(2));
        assert!(matches!(claim(location, "two", How::Fresh), Err(ClaimError::Taken { .. })));
        assert_eq!(claim(location, "two", How::Resume).unwrap(), "two");
    });
}
