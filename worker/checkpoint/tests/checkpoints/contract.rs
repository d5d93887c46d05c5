//! What every kind of location does alike.

use std::sync::Arc;

use mattock_checkpoint::{
    Flaw, Layout, LoadError, Location, Outcome, Slices, Snapshot, TensorMeta, Tuning, Which, list, load,
    load_weights, probe, show, verify,
};

use crate::samples::{array, assert_is, keep, layout, must_save, save_snapshot, snapshot};

/// Runs a claim over memory, a local folder, and S3 where a server is given.
pub(crate) fn over_every_store(name: &str, claim: fn(&Location)) {
    claim(&Location::parse(&format!("memory://{name}")).unwrap());
    let folder = tempfile::tempdir().unwrap();
    claim(&Location::parse(folder.path().join("not yet there").to_str().unwrap()).unwrap());
    match std::env::var("MATTOCK_TEST_S3_URL") {
        Ok(url) => claim(&Location::parse(&format!("{url}/{name}-{}", std::process::id())).unwrap()),
        Err(_) => {
            let skipped =
                "skipped over S3: MATTOCK_TEST_S3_URL (s3://bucket, with AWS_ENDPOINT and keys) is not set";
            assert!(std::env::var_os("MATTOCK_TEST_NO_SKIP").is_none(), "{skipped}");
            eprintln!("{skipped}");
        }
    }
}

#[test]
fn what_is_saved_loads_to_the_bit() {
    over_every_store("round-trip", |location| {
        let saved = must_save(location, 7, keep(3));
        let (loaded, skipped) = load(location, Which::Newest, &layout()).unwrap();
        assert_is(&loaded, 7);
        assert_eq!((skipped.len(), loaded.head.url), (0, saved.url));
        assert_eq!(loaded.head.manifest.bytes(), saved.bytes);
        assert!(verify(location, None).unwrap().iter().all(|verdict| verdict.flaws.is_empty()));
    });
}

/// Several parts of the least size that S3 takes, and ranges of several requests.
#[test]
fn what_is_larger_than_a_part_loads_to_the_bit() {
    over_every_store("large", |location| {
        const ELEMENTS: usize = 2_900_000;
        let tensor = TensorMeta { name: "w".into(), shape: vec![29, 100_000], offset: 0 };
        let layout = Layout::new(vec![tensor], ELEMENTS).unwrap();
        let array =
            |seed: usize| Arc::new((0..ELEMENTS).map(|n| (n * 7 + seed) as f32).collect::<Vec<f32>>());
        let (params, m, v) = (array(1), array(2), array(3));
        let [p, m2, v2] = [&params, &m, &v].map(|array| Slices::whole(Arc::clone(array)));
        let snapshot = Snapshot { layout: Arc::new(layout.clone()), params: p, m: m2, v: v2, ..snapshot(1) };
        let tuning = Tuning { part_bytes: 5 << 20, ..Tuning::default() };
        let outcome = save_snapshot(location, snapshot, keep(1), tuning);
        assert!(matches!(outcome, Outcome::Saved(_)), "{outcome:?}");
        let loaded = load(location, Which::Newest, &layout).unwrap().0;
        assert!(loaded.params == *params && loaded.m == *m && loaded.v == *v);
    });
}

#[test]
fn the_newest_so_many_are_kept() {
    over_every_store("retention", |location| {
        for step in 1..=4 {
            let removed = must_save(location, step, keep(2)).removed;
            assert_eq!(removed, step.checked_sub(2).filter(|&old| old > 0).into_iter().collect::<Vec<_>>());
        }
        let listing = list(location).unwrap();
        assert_eq!(listing.complete.iter().map(|summary| summary.step).collect::<Vec<_>>(), [4, 3]);
        assert_eq!(listing.unusable, []);
    });
}

#[test]
fn a_step_that_is_saved_again_stays_one_checkpoint() {
    over_every_store("again", |location| {
        must_save(location, 1, keep(1));
        let first = show(location, Which::Newest).unwrap().0;
        must_save(location, 1, keep(1));
        assert_eq!(show(location, Which::Newest).unwrap().0, first, "the whole one was kept as it was");
    });
}

#[test]
fn a_run_that_went_back_saves_an_older_step_beside_the_newer() {
    over_every_store("back", |location| {
        must_save(location, 5, keep(1));
        must_save(location, 3, keep(1));
        let listing = list(location).unwrap();
        assert_eq!(listing.complete.iter().map(|summary| summary.step).collect::<Vec<_>>(), [5, 3]);
    });
}

#[test]
fn a_step_is_loaded_by_name_and_a_missing_one_named() {
    over_every_store("by-step", |location| {
        must_save(location, 1, keep(3));
        must_save(location, 2, keep(3));
        assert_is(&load(location, Which::Step(1), &layout()).unwrap().0, 1);
        let error = load(location, Which::Step(9), &layout()).unwrap_err();
        assert!(matches!(error, LoadError::NoStep { step: 9, newest: Some(2), .. }), "{error}");
    });
}

#[test]
fn weights_load_with_the_layout_that_the_configuration_tells() {
    over_every_store("weights", |location| {
        must_save(location, 1, keep(1));
        let (weights, _) = load_weights(location, Which::Newest, |head| {
            assert_eq!(head.files.config_json, snapshot(1).files.config_json);
            Ok(layout())
        })
        .unwrap();
        assert_eq!(weights.params, *array(1, 0.0));
    });
}

#[test]
fn a_probe_leaves_nothing_behind() {
    over_every_store("probe", |location| {
        probe(location).unwrap();
        assert_eq!(list(location).unwrap(), Default::default());
        let error = load(location, Which::Newest, &layout()).unwrap_err();
        assert!(matches!(&error, LoadError::None { skipped, .. } if skipped.is_empty()), "{error}");
    });
}

#[test]
fn a_folder_that_does_not_exist_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("nowhere");
    let location = Location::parse(missing.to_str().unwrap()).unwrap();
    let error = list(&location).unwrap_err();
    assert!(error.is_missing() && error.to_string().contains("nowhere"), "{error}");
    assert!(!missing.exists(), "looking makes no folder");
}

#[test]
fn a_folder_that_cannot_be_made_is_a_clear_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let location = Location::parse(file.path().join("below").to_str().unwrap()).unwrap();
    let error = probe(&location).unwrap_err().to_string();
    assert!(error.contains("below") && error.contains("make the folder"), "{error}");
}

/// What a killed process leaves of an upload in a folder goes with the attempt that it belonged to.
#[test]
fn remains_of_a_killed_writer_are_removed_with_the_next_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location::parse(folder.path().to_str().unwrap()).unwrap();
    let attempt = folder.path().join("step-00000001");
    std::fs::create_dir(&attempt).unwrap();
    std::fs::write(attempt.join("config.json"), "{}").unwrap();
    std::fs::write(attempt.join("model.safetensors#1"), "half").unwrap();
    let listing = list(&location).unwrap();
    assert_eq!(listing.unusable[0].flaw, Flaw::NoManifest);
    assert_eq!(must_save(&location, 2, keep(3)).removed, [1]);
    assert!(!attempt.exists());
}
