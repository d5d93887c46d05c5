//! Several writers that do not speak with each other, and the store as the arbiter between them.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mattock_checkpoint::{
    Layout, Location, Outcome, Share, Slices, Snapshot, Tuning, Which, Writer, list, load, load_ranges,
    verify,
};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use crate::contract::over_every_store;
use crate::faulty::{Fault, Faulty};
use crate::samples::{PATIENCE, array, assert_is, keep, layout, must_save, snapshot, tuning, tuning_for};

/// What share `index` of `of` hands over: moments divided at multiples of 4, weights between tensors.
fn part(step: u64, index: u32, of: u32) -> Snapshot {
    let share = Share { index, of, attempt: 1 };
    let moments = [share.of_elements(layout().elements(), 4)];
    Snapshot {
        share,
        params: Slices::cut(&array(step, 0.0), &share.of_tensors(&layout())),
        m: Slices::cut(&array(step, 0.125), &moments),
        v: Slices::cut(&array(step, 0.0625), &moments),
        ..snapshot(step)
    }
}

/// A writer that was handed one snapshot.
fn writer(location: &Location, snapshot: Snapshot, tuning: Tuning) -> Writer {
    let mut writer = Writer::start(location, keep(3), tuning).unwrap();
    writer.submit(snapshot).unwrap();
    writer
}

/// Waits for its first outcome.
fn await_outcome(writer: &mut Writer) {
    let until = Instant::now() + PATIENCE;
    while writer.poll_outcomes().is_empty() {
        assert!(Instant::now() < until, "no outcome");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Writes all shares in this order, share 0 being told when all are there.
fn save_shares(location: &Location, step: u64, order: impl IntoIterator<Item = u32>, of: u32) {
    let writers =
        order.into_iter().map(|index| writer(location, part(step, index, of), tuning_for(location)));
    let mut saved = 0;
    // Share 0 may wait for any of the others, so all are there before any is waited for.
    for writer in writers.collect::<Vec<_>>() {
        let outcomes = writer.finish(PATIENCE).unwrap();
        saved += outcomes
            .iter()
            .filter(|outcome| matches!(outcome, Outcome::Saved(saved) if saved.step == step))
            .count();
    }
    assert_eq!(saved, 1, "share 0, and only that, is told that it is complete");
}

#[test]
fn what_some_save_others_load_to_the_bit() {
    over_every_store("reshard", |location| {
        for of in 1..=4 {
            let step = u64::from(of);
            save_shares(location, step, 0..of, of);
            assert_is(&load(location, Which::Step(step), &layout()).unwrap().0, step);
            for readers in 1..=4 {
                for index in 0..readers {
                    assert_share_loads(location, step, Share { index, of: readers, attempt: 0 });
                }
            }
        }
        assert!(verify(location, None).unwrap().iter().all(|verdict| verdict.flaws.is_empty()));
    });
}

fn assert_share_loads(location: &Location, step: u64, share: Share) {
    let (params, moments) = (share.of_tensors(&layout()), [share.of_elements(layout().elements(), 8)]);
    let (loaded, _) = load_ranges(location, Which::Step(step), &layout(), &params, &moments).unwrap();
    let of = |which: f32, ranges: &[Range<usize>]| -> Vec<f32> {
        ranges.iter().flat_map(|range| array(step, which)[range.clone()].to_vec()).collect()
    };
    assert_eq!(loaded.params, of(0.0, &params));
    assert_eq!((loaded.m, loaded.v), (of(0.125, &moments), of(0.0625, &moments)));
    assert_eq!(loaded.exponents, *snapshot(step).exponents);
}

#[test]
fn whoever_is_last_finishes_it() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        let location = Location::given("memory://given", Arc::new(InMemory::new()));
        let mut pending = Vec::new();
        for index in order {
            assert_eq!(list(&location).unwrap().complete.len(), 0);
            let mut writer = writer(&location, part(1, index, 3), tuning());
            await_outcome(&mut writer);
            pending.push(writer);
        }
        assert_eq!(list(&location).unwrap().complete.len(), 1, "{order:?}");
        pending.into_iter().for_each(|writer| drop(writer.finish(PATIENCE).unwrap()));
        assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 1);
    }
}

/// More shares than tensors: some have nothing to write but a record.
#[test]
fn shares_may_be_empty() {
    let location = Location::given("memory://given", Arc::new(InMemory::new()));
    save_shares(&location, 1, 0..9, 9);
    assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 1);
}

#[tokio::main(flavor = "current_thread")]
async fn names(store: &InMemory) -> Vec<String> {
    use futures::TryStreamExt;
    let found: Vec<_> = store.list(None).try_collect().await.unwrap();
    found.iter().map(|meta| meta.location.to_string()).collect()
}

#[test]
fn a_complete_checkpoint_has_no_records_beside_it_and_an_index() {
    let store = Arc::new(InMemory::new());
    let location = Location::given("memory://given", Arc::clone(&store) as Arc<dyn ObjectStore>);
    save_shares(&location, 1, 0..3, 3);
    let names = names(&store);
    assert!(names.iter().all(|name| !name.contains("share-")), "{names:?}");
    let head = mattock_checkpoint::show(&location, Which::Newest).unwrap().0;
    assert_eq!((head.manifest.shares, head.manifest.pieces.len() + 1), (3, names.len()));
    let index: serde_json::Value =
        serde_json::from_slice(&read(&store, "step-00000001/model.safetensors.index.json")).unwrap();
    for tensor in layout().tensors() {
        let file = index["weight_map"][&tensor.name].as_str().unwrap();
        let bytes = read(&store, &format!("step-00000001/{file}"));
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor(&tensor.name).unwrap().shape(), tensor.shape, "whole, under its own name");
    }
}

#[tokio::main(flavor = "current_thread")]
async fn read(store: &InMemory, name: &str) -> Vec<u8> {
    store.get(&Path::from(name)).await.unwrap().bytes().await.unwrap().to_vec()
}

#[test]
fn shares_of_two_attempts_are_no_checkpoint() {
    let other_state = |snapshot: Snapshot| Snapshot { state_hash: 1, ..snapshot };
    let other_attempt =
        |snapshot: Snapshot| Snapshot { share: Share { attempt: 2, ..snapshot.share }, ..snapshot };
    let other_run = |snapshot: Snapshot| {
        let run = Arc::new(mattock_checkpoint::RunFacts { total_steps: 10, ..(*snapshot.run).clone() });
        Snapshot { run, ..snapshot }
    };
    let changes: [fn(Snapshot) -> Snapshot; 3] = [other_state, other_attempt, other_run];
    for change in changes {
        let location = Location::given("memory://given", Arc::new(InMemory::new()));
        must_save(&location, 1, keep(3));
        writer(&location, part(2, 1, 2), tuning()).finish(PATIENCE).unwrap();
        let mut first = writer(&location, change(part(2, 0, 2)), tuning());
        await_outcome(&mut first);
        let error = first.finish(Duration::ZERO).unwrap_err();
        assert!(matches!(error.outcomes[..], [Outcome::Incomplete { step: 2, .. }]), "{error:?}");
        assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 1);
    }
}

/// Its worker died: the others' shares are taken for nothing, and go with the next checkpoint.
#[test]
fn a_share_that_never_comes_costs_only_its_own_checkpoint() {
    let store = Arc::new(InMemory::new());
    let location = Location::given("memory://given", Arc::clone(&store) as Arc<dyn ObjectStore>);
    must_save(&location, 1, keep(3));
    writer(&location, part(2, 1, 3), tuning()).finish(PATIENCE).unwrap();
    let mut first = writer(&location, part(2, 0, 3), tuning());
    await_outcome(&mut first);
    assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 1);
    first.submit(part(3, 0, 2)).unwrap();
    writer(&location, part(3, 1, 2), tuning()).finish(PATIENCE).unwrap();
    let outcomes = first.finish(PATIENCE).unwrap();
    let told = |wanted: fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| wanted(outcome)).count();
    assert_eq!(
        told(|outcome| matches!(outcome, Outcome::Saved(saved) if saved.step == 3 && saved.removed == [2])),
        1
    );
    assert_eq!(told(|outcome| matches!(outcome, Outcome::Incomplete { step: 2, .. })), 1);
    assert!(names(&store).iter().all(|name| !name.starts_with("step-00000002")));
}

/// Where the shares cannot all come, one that has everything writes alone, and nobody is in its way.
#[test]
fn one_writer_takes_over_what_several_began() {
    let location = Location::given("memory://given", Arc::new(InMemory::new()));
    writer(&location, part(1, 1, 3), tuning()).finish(PATIENCE).unwrap();
    let mut first = writer(&location, part(1, 0, 3), tuning());
    await_outcome(&mut first);
    first.submit(snapshot(1)).unwrap();
    let outcomes = first.finish(PATIENCE).unwrap();
    assert!(matches!(&outcomes[..], [Outcome::Saved(saved)] if saved.step == 1), "{outcomes:?}");
    assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 1);
    // The third comes late.
    writer(&location, part(1, 2, 3), tuning()).finish(PATIENCE).unwrap();
    assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 1);
    assert_eq!(list(&location).unwrap().unusable, []);
}

/// All of it is written instead of a share whose writing failed: what counts is what came last.
#[test]
fn a_share_that_failed_is_settled_by_the_whole() {
    let (faulty, reached) = Faulty::over(Arc::new(InMemory::new()), Fault::Truncates, 2);
    let mut writer = writer(&faulty.location(), part(1, 0, 2), tuning());
    reached.recv().unwrap();
    writer.submit(snapshot(1)).unwrap();
    let outcomes = writer.finish(PATIENCE).unwrap();
    assert!(matches!(&outcomes[..], [Outcome::Failed { step: 1, .. }, Outcome::Saved(_)]), "{outcomes:?}");
}

/// Shares saved by a writer that sees a fault at its nth write, while the others see a sound store.
fn at_every_write_point(fault: Fault, check: fn(complete: bool)) {
    for victim in 0..3 {
        for at in 1.. {
            let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let location = Location::given("memory://sound", Arc::clone(&store));
            must_save(&location, 1, keep(3));
            let (faulty, _) = Faulty::over(store, fault.clone(), at);
            for index in [0, 1, 2].into_iter().filter(|&index| index != victim) {
                let mut sound = writer(&location, part(2, index, 3), tuning());
                await_outcome(&mut sound);
                drop(sound);
            }
            let mut last = writer(&faulty.location(), part(2, victim, 3), tuning());
            await_outcome(&mut last);
            drop(last);
            let listing = list(&location).unwrap();
            for summary in &listing.complete {
                assert_eq!(
                    verify(&location, Some(summary.step)).unwrap()[0].flaws,
                    [],
                    "{fault:?} at write {at}"
                );
            }
            let newest = listing.complete[0].step;
            assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, newest);
            check(newest == 2);
            // Whatever is left, the same share can be written again.
            let again = writer(&location, part(2, victim, 3), tuning()).finish(PATIENCE).unwrap();
            assert_eq!(again.len(), 1, "{fault:?} at write {at}: {again:?}");
            assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 2);
            if !faulty.happened() {
                assert!(at > 6, "{at} write points are too few to be true");
                break;
            }
        }
    }
}

#[test]
fn a_busy_moment_of_one_writer_is_waited_out() {
    at_every_write_point(Fault::Busy, |complete| assert!(complete));
}

#[test]
fn a_lost_reply_to_one_writer_changes_nothing() {
    at_every_write_point(Fault::LostReply, |complete| assert!(complete));
}

#[test]
fn one_writer_whose_store_keeps_half_makes_no_checkpoint() {
    at_every_write_point(Fault::Truncates, |_| {});
}

#[test]
fn one_writer_killed_before_any_write_costs_no_checkpoint() {
    at_every_write_point(Fault::Dead, |_| {});
}

#[test]
fn one_writer_killed_after_any_write_costs_no_checkpoint() {
    at_every_write_point(Fault::DeadAfter, |_| {});
}

#[test]
fn one_writer_without_space_costs_no_checkpoint() {
    at_every_write_point(Fault::Full, |_| {});
}

/// A run that goes back comes by a damaged checkpoint again, on as many workers as before or on others.
#[test]
fn a_damaged_checkpoint_of_shares_is_mended_by_saving_it_again() {
    for of in 1..=3 {
        for piece in 0..9 {
            let store = Arc::new(InMemory::new());
            let location = Location::given("memory://given", Arc::clone(&store) as Arc<dyn ObjectStore>);
            save_shares(&location, 1, 0..3, 3);
            let names = names(&store);
            let name = &names[piece % names.len()];
            let mut bytes = read(&store, name);
            bytes[1] ^= 1;
            write(&store, name, bytes);
            if of == 1 {
                drop(must_save(&location, 1, keep(3)))
            } else {
                save_shares(&location, 1, 0..of, of)
            }
            let found = load(&location, Which::Newest, &layout());
            let (loaded, skipped) =
                found.unwrap_or_else(|error| panic!("{name} damaged, saved by {of}: {error}"));
            assert_is(&loaded, 1);
            assert_eq!(
                (skipped, verify(&location, None).unwrap()[0].flaws.clone()),
                (Vec::new(), Vec::new()),
                "{name}"
            );
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn write(store: &InMemory, name: &str, bytes: Vec<u8>) {
    store.put(&Path::from(name), bytes.into()).await.unwrap();
}

/// Files of weights are cut between tensors where they would be longer, whoever writes.
#[test]
fn long_files_are_cut_between_tensors() {
    for of in [1, 2] {
        let store = Arc::new(InMemory::new());
        let location = Location::given("memory://given", Arc::clone(&store) as Arc<dyn ObjectStore>);
        let cut = Tuning { file_bytes: 48, ..tuning() };
        let writers: Vec<Writer> = (0..of)
            .map(|index| writer(&location, if of == 1 { snapshot(1) } else { part(1, index, of) }, cut))
            .collect();
        writers.into_iter().for_each(|writer| drop(writer.finish(PATIENCE).unwrap()));
        let names = names(&store);
        let weights = names.iter().filter(|name| name.contains("/model-")).count();
        assert_eq!(weights, 2, "{names:?}");
        assert!(names.iter().any(|name| name.ends_with("model.safetensors.index.json")));
        assert_is(&load(&location, Which::Newest, &layout()).unwrap().0, 1);
    }
}

#[test]
fn a_part_of_a_tensor_is_refused_as_weights() {
    let location = Location::given("memory://given", Arc::new(InMemory::new()));
    let mut writer = Writer::start(&location, keep(1), tuning()).unwrap();
    let half = Snapshot { params: Slices::cut(&array(1, 0.0), &[0..10, 24..40]), ..part(1, 0, 2) };
    assert_eq!(writer.submit(half).unwrap_err().array, "params");
    let none = Snapshot { share: Share { index: 2, of: 2, attempt: 0 }, ..part(1, 0, 2) };
    assert_eq!(writer.submit(none).unwrap_err().array, "share");
}

/// A model whose tensors have no elements at all, or which has none, is a checkpoint too.
#[test]
fn a_layout_without_elements_is_saved_and_loaded() {
    let location = Location::given("memory://given", Arc::new(InMemory::new()));
    let empty = Layout::new(Vec::new(), 0).unwrap();
    let nothing = || Slices::whole(Arc::new(Vec::new()));
    let snapshot = Snapshot {
        layout: Arc::new(empty.clone()),
        params: nothing(),
        m: nothing(),
        v: nothing(),
        exponents: Arc::new(Vec::new()),
        ..snapshot(1)
    };
    writer(&location, snapshot, tuning()).finish(PATIENCE).unwrap();
    assert_eq!(load(&location, Which::Newest, &empty).unwrap().0.params, Vec::<f32>::new());
}
