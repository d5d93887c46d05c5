//! What is kept, what is sent again, and what is removed.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use mattock_checkpoint::{
    Files, Location, Outcome, Retention, Share, Slices, Snapshot, Tuning, Which, gc, list, load, verify,
};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use crate::contract::over_every_store;
use crate::faulty::{Fault, Faulty};
use crate::samples::{array, assert_is, keep, layout, must_save, save_snapshot, snapshot, tuning};

#[test]
fn those_of_every_so_many_steps_are_kept_beside_the_newest() {
    over_every_store("keep-every", |location| {
        let retention = Retention { keep: NonZeroU32::new(2).unwrap(), keep_every: 3 };
        for step in 0..=8 {
            must_save(location, step, retention);
        }
        let kept: Vec<u64> = list(location).unwrap().complete.iter().map(|summary| summary.step).collect();
        assert_eq!(kept, [8, 7, 6, 3], "step 0 can be had again from the recipe");
    });
}

/// Weights of step 1 at every step, in a file for each tensor, and a tokenizer that stays the same.
fn frozen(step: u64) -> Snapshot {
    let files = Files { tokenizer_json: Some(vec![b' '; 5000].into()), ..(*snapshot(1).files).clone() };
    Snapshot { params: Slices::whole(array(1, 0.0)), files: Arc::new(files), ..snapshot(step) }
}

fn sent_for(location: &Location, faulty: &Faulty, snapshot: Snapshot) -> usize {
    let before = faulty.sent_bytes();
    let outcome = save_snapshot(location, snapshot, keep(1), tuning());
    assert!(matches!(outcome, Outcome::Saved(_)), "{outcome:?}");
    faulty.sent_bytes() - before
}

#[test]
fn what_did_not_change_is_not_sent_again() {
    let store = Arc::new(InMemory::new());
    let (faulty, _) = Faulty::over(Arc::clone(&store) as Arc<dyn ObjectStore>, Fault::Busy, usize::MAX);
    let location = faulty.location();
    let first = sent_for(&location, &faulty, frozen(1));
    let second = sent_for(&location, &faulty, frozen(2));
    let weights = read(&store, "step-00000002/model.safetensors").len();
    assert!(first - second >= weights + 5000, "{first} bytes, then {second}; {weights} of weights");
    // That of step 1, of which it was copied, is gone by now.
    let (loaded, _) = load(&location, Which::Newest, &layout()).unwrap();
    assert_eq!(
        (loaded.head.manifest.step, &loaded.params, &loaded.m),
        (2, &*array(1, 0.0), &*array(2, 0.125))
    );
    assert_eq!(verify(&location, None).unwrap()[0].flaws, []);
}

#[test]
fn what_is_damaged_is_sent_anew_and_not_passed_on() {
    for at in [0.1, 0.5, 0.99] {
        let store = Arc::new(InMemory::new());
        let location = Location::given("memory://given", Arc::clone(&store) as Arc<dyn ObjectStore>);
        // Two or three chunks each: few enough that all are looked at.
        let tuning = Tuning { chunk_bytes: 2048, ..tuning() };
        save_snapshot(&location, frozen(1), keep(3), tuning);
        for piece in ["tokenizer.json", "config.json"] {
            let name = format!("step-00000001/{piece}");
            let mut bytes = read(&store, &name);
            let at = (bytes.len() as f64 * at) as usize;
            bytes[at] ^= 1;
            write(&store, &name, bytes);
        }
        save_snapshot(&location, frozen(2), keep(3), tuning);
        assert_eq!(verify(&location, Some(2)).unwrap()[0].flaws, []);
    }
}

#[test]
fn in_a_folder_a_checkpoint_stands_when_the_one_it_was_linked_from_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location::parse(folder.path().to_str().unwrap()).unwrap();
    let large = |step| {
        let files =
            Files { tokenizer_json: Some(vec![b' '; 2 << 20].into()), ..(*snapshot(1).files).clone() };
        Snapshot { files: Arc::new(files), ..snapshot(step) }
    };
    for step in 1..=3 {
        let outcome = save_snapshot(&location, large(step), keep(1), Tuning::default());
        assert!(matches!(outcome, Outcome::Saved(_)), "{outcome:?}");
    }
    assert!(!folder.path().join("step-00000001").exists());
    assert_eq!(verify(&location, None).unwrap()[0].flaws, []);
}

#[tokio::main(flavor = "current_thread")]
async fn read(store: &InMemory, name: &str) -> Vec<u8> {
    store.get(&Path::from(name)).await.unwrap().bytes().await.unwrap().to_vec()
}

#[tokio::main(flavor = "current_thread")]
async fn write(store: &InMemory, name: &str, bytes: Vec<u8>) {
    store.put(&Path::from(name), bytes.into()).await.unwrap();
}

/// A complete checkpoint, a share of one that never got complete, and something that lies beside a complete one.
fn untidy(store: &Arc<InMemory>) -> Location {
    let location = Location::given("memory://given", Arc::clone(store) as Arc<dyn ObjectStore>);
    must_save(&location, 1, keep(3));
    let share = Share { index: 1, of: 2, attempt: 1 };
    let half = [share.of_elements(layout().elements(), 4)];
    let part = Snapshot {
        share,
        params: Slices::cut(&array(5, 0.0), &share.of_tensors(&layout())),
        m: Slices::cut(&array(5, 0.125), &half),
        v: Slices::cut(&array(5, 0.0625), &half),
        ..snapshot(5)
    };
    let outcome = save_snapshot(&location, part, keep(3), tuning());
    assert!(matches!(outcome, Outcome::Written { .. }), "{outcome:?}");
    write(store, "step-00000001/left.safetensors", vec![1; 10]);
    write(store, "probe-00", vec![1; 10]);
    write(store, "run.json", vec![1; 10]);
    location
}

#[test]
fn garbage_is_removed_when_it_is_old_enough_and_nothing_else() {
    let store = Arc::new(InMemory::new());
    let location = untidy(&store);
    let young = gc(&location, Duration::from_secs(3600), false).unwrap();
    assert_eq!(young, Default::default(), "somebody may be at work on it");
    // The clock of the store may be a little ahead.
    std::thread::sleep(Duration::from_millis(5));
    let told = gc(&location, Duration::ZERO, true).unwrap();
    assert_eq!(told.objects.iter().filter(|name| name.starts_with("step-00000005/")).count(), 3);
    assert_eq!(gc(&location, Duration::ZERO, false).unwrap(), told, "what is told is what is removed");
    assert_eq!(gc(&location, Duration::ZERO, false).unwrap(), Default::default());
    assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 1);
    assert_eq!(list(&location).unwrap().unusable, []);
    assert_eq!(read(&store, "run.json").len(), 10);
}

#[test]
fn a_damaged_manifest_is_no_garbage() {
    let store = Arc::new(InMemory::new());
    let location = untidy(&store);
    let mut manifest = read(&store, "step-00000001/manifest.json");
    manifest[5] ^= 1;
    write(&store, "step-00000001/manifest.json", manifest);
    std::thread::sleep(Duration::from_millis(5));
    let garbage = gc(&location, Duration::ZERO, false).unwrap();
    assert!(garbage.objects.iter().all(|name| !name.starts_with("step-00000001/")), "{garbage:?}");
}
