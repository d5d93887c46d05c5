//! A tiny model and its state, different at every step.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use mattock_checkpoint::{
    Files, Layout, Loaded, Location, Outcome, Retention, RunFacts, Saved, Share, Slices, Snapshot,
    TensorMeta, Tuning, Writer,
};

pub(crate) const RUN: &str = "sample-run";
/// Longer than anything here takes; nothing waits for it to pass.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Three tensors with padding between and behind them.
pub(crate) fn layout() -> Layout {
    let tensor =
        |name: &str, shape: &[usize], offset| TensorMeta { name: name.into(), shape: shape.into(), offset };
    let tensors = vec![
        tensor("wte.weight", &[7, 3], 0),
        tensor("ln.bias", &[3], 24),
        tensor("h.0.mlp", &[2, 2, 2], 32),
    ];
    Layout::new(tensors, 48).unwrap()
}

/// Zero outside every tensor, otherwise different for every array, step and element.
pub(crate) fn array(step: u64, which: f32) -> Arc<Vec<f32>> {
    let mut values = vec![0.0; 48];
    for tensor in layout().tensors() {
        for at in tensor.span() {
            values[at] = at as f32 * 0.25 + step as f32 * 1000.0 + which;
        }
    }
    Arc::new(values)
}

pub(crate) fn snapshot(step: u64) -> Snapshot {
    Snapshot {
        step,
        state_hash: step.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        layout: Arc::new(layout()),
        share: Share::WHOLE,
        params: Slices::whole(array(step, 0.0)),
        m: Slices::whole(array(step, 0.125)),
        v: Slices::whole(array(step, 0.0625)),
        exponents: Arc::new(vec![-3, 8 + step as i16]),
        files: Arc::new(Files {
            config_json: r#"{"n_layer": 1}"#.into(),
            tokenizer_json: Some("{}".into()),
            recipe_toml: Some("seed = 42\n".into()),
        }),
        run: Arc::new(RunFacts {
            run_id: RUN.into(),
            program: "mattock test".into(),
            seed: 42,
            total_steps: 9,
            dataset: "d".into(),
        }),
    }
}

/// Small parts, so that a tiny model is a multipart upload, and no pauses.
pub(crate) fn tuning() -> Tuning {
    Tuning {
        part_bytes: 64,
        parts_in_flight: 2,
        chunk_bytes: 32,
        tries_max: 3,
        pause: Duration::ZERO,
        look: Duration::from_millis(1),
        ..Tuning::default()
    }
}

pub(crate) fn keep(keep: u32) -> Retention {
    Retention { keep: NonZeroU32::new(keep).unwrap(), keep_every: 0 }
}

/// Saves one step and tells what became of it.
pub(crate) fn save(location: &Location, step: u64, retention: Retention) -> Outcome {
    save_snapshot(location, snapshot(step), retention, tuning_for(location))
}

/// Real servers want parts of 5 MiB.
pub(crate) fn tuning_for(location: &Location) -> Tuning {
    if location.to_string().starts_with("s3://") { Tuning::default() } else { tuning() }
}

pub(crate) fn save_snapshot(
    location: &Location,
    snapshot: Snapshot,
    retention: Retention,
    tuning: Tuning,
) -> Outcome {
    let mut writer = Writer::start(location, retention, tuning).unwrap();
    writer.submit(snapshot).unwrap();
    let mut outcomes = match writer.finish(PATIENCE) {
        Ok(outcomes) => outcomes,
        Err(error) => error.outcomes,
    };
    assert_eq!(outcomes.len(), 1, "{outcomes:?}");
    outcomes.remove(0)
}

pub(crate) fn must_save(location: &Location, step: u64, retention: Retention) -> Saved {
    match save(location, step, retention) {
        Outcome::Saved(saved) => saved,
        other => panic!("step {step} was not saved: {other:?}"),
    }
}

/// What was loaded is that step's state, to the bit.
pub(crate) fn assert_is(loaded: &Loaded, step: u64) {
    let want = snapshot(step);
    assert_eq!((loaded.head.manifest.step, loaded.head.manifest.state_hash), (step, want.state_hash));
    assert_eq!(loaded.params, *array(step, 0.0));
    assert_eq!((&loaded.m, &loaded.v), (&*array(step, 0.125), &*array(step, 0.0625)));
    assert_eq!(loaded.exponents, *want.exponents);
    assert_eq!(loaded.head.files, *want.files);
}
