//! What the measurements of writing and of loading share: a place, a model, a checkpoint.

use std::error::Error;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mattock_checkpoint::{
    Files, Layout, LayoutError, Location, Retention, RunFacts, Share, Slices, Snapshot, TensorMeta, Tuning,
    Writer,
};
use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;

/// Tensors of the model.
const TENSORS: usize = 96;
/// Longer than a round takes.
const PATIENCE: Duration = Duration::from_secs(600);

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// A model whose checkpoints have about so many bytes.
pub(crate) fn model(bytes: usize) -> Result<Layout, LayoutError> {
    let elements = (bytes / 12 / TENSORS).next_multiple_of(256) * TENSORS;
    let each = elements / TENSORS;
    let tensor = |n| TensorMeta { name: format!("layer.{n}"), shape: vec![each], offset: n * each };
    Layout::new((0..TENSORS).map(tensor).collect(), elements)
}

/// A place to put plain objects, and the prefix of their names.
pub(crate) fn open(url: &str) -> Result<(Arc<dyn ObjectStore>, Path), Failure> {
    // Two rustls providers may be linked, and then none is the default. Fails if one is set.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(match url.strip_prefix("s3://") {
        Some(rest) => {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            (Arc::new(AmazonS3Builder::from_env().with_bucket_name(bucket).build()?), Path::parse(prefix)?)
        }
        None => {
            std::fs::create_dir_all(url)?;
            (Arc::new(LocalFileSystem::new_with_prefix(url)?.with_fsync(true)), Path::default())
        }
    })
}

/// Writes a checkpoint; how long the copy of a share took, and all of the writing after it.
pub(crate) fn checkpoint(
    url: &str,
    bytes: usize,
    of: u32,
    step: u64,
) -> Result<(Duration, Duration), Failure> {
    let layout = Arc::new(model(bytes)?);
    let elements = layout.elements();
    let state: Vec<f32> = (0..elements).map(|n| (n as u64 ^ step << 20) as f32).collect();
    let location = Location::parse(url)?;
    let retention = Retention { keep: NonZeroU32::MIN, keep_every: 0 };
    let (mut writers, mut copy) = (Vec::new(), Duration::ZERO);
    let mut snapshots = Vec::new();
    for index in 0..of {
        let share = Share { index, of, attempt: 1 };
        let moments = share.of_elements(elements, 256);
        let begun = Instant::now();
        let params = Slices::cut(&state, &share.of_tensors(&layout));
        let [m, v] = [0, 1].map(|_| Slices::cut(&state, std::slice::from_ref(&moments)));
        copy = copy.max(begun.elapsed());
        snapshots.push(Snapshot {
            step,
            state_hash: step,
            layout: Arc::clone(&layout),
            share,
            params,
            m,
            v,
            exponents: Arc::new(vec![0; elements / 256]),
            files: Arc::new(Files { config_json: "{}".into(), ..Files::default() }),
            run: Arc::new(RunFacts {
                run_id: "bench".into(),
                program: "bench".into(),
                seed: 0,
                total_steps: step,
                dataset: String::new(),
            }),
        });
        writers.push(Writer::start(&location, retention, Tuning::default())?);
    }
    let begun = Instant::now();
    for (writer, snapshot) in writers.iter_mut().zip(snapshots) {
        writer.submit(snapshot)?;
    }
    // Share 0 is told when all are there.
    for writer in writers.into_iter().rev() {
        writer.finish(PATIENCE).map_err(|error| error.to_string())?;
    }
    Ok((copy, begun.elapsed()))
}
