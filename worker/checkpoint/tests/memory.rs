//! What writing a checkpoint takes of memory: no more than its bound, however slow the store is. A program of its own, since memory
//! is counted by process.

#![allow(clippy::unwrap_used, reason = "helpers of tests, outside of test functions")]

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use mattock_checkpoint::{
    Files, Layout, Location, Retention, RunFacts, Share, Slices, Snapshot, TensorMeta, Tuning, Writer,
};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// What [`Tuning::within`] is given.
const BOUND: u64 = 64 << 20;
/// What is allowed beside it: stacks, clients, what the allocator keeps.
const BESIDE: u64 = 64 << 20;
/// Of each array of the state; they share their memory.
const ELEMENTS: usize = 32 << 20;
/// Longer than anything here takes; nothing waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(300);

/// A folder that takes its time for every part, as a store over a network does.
#[derive(Debug)]
struct Slow(LocalFileSystem);

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slow({})", self.0)
    }
}

#[async_trait]
impl ObjectStore for Slow {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.0.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Ok(Box::new(SlowUpload(self.0.put_multipart_opts(location, options).await?)))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.0.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.0.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct SlowUpload(Box<dyn MultipartUpload>);

#[async_trait]
impl MultipartUpload for SlowUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let part = self.0.put_part(data);
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            part.await
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.0.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.0.abort().await
    }
}

fn snapshot(values: &Arc<Vec<f32>>) -> Snapshot {
    let each = ELEMENTS / 8;
    let tensor = |n| TensorMeta { name: format!("layer.{n}"), shape: vec![each], offset: n * each };
    let whole = || Slices::whole(Arc::clone(values));
    Snapshot {
        step: 1,
        state_hash: 1,
        layout: Arc::new(Layout::new((0..8).map(tensor).collect(), ELEMENTS).unwrap()),
        share: Share::WHOLE,
        params: whole(),
        m: whole(),
        v: whole(),
        exponents: Arc::new(vec![0; ELEMENTS / 256]),
        files: Arc::new(Files { config_json: "{}".into(), ..Files::default() }),
        run: Arc::new(RunFacts {
            run_id: "memory".into(),
            program: "test".into(),
            seed: 0,
            total_steps: 1,
            dataset: String::new(),
        }),
    }
}

/// A line of what the kernel tells of this process, in bytes.
fn memory(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let found = status.lines().find_map(|found| found.strip_prefix(line)).unwrap();
    found.trim_matches([':', '\t', ' ', 'k', 'B']).parse::<u64>().unwrap() << 10
}

/// By how much the process grew at most while a checkpoint was written there.
fn growth(location: &Location) -> u64 {
    let values = Arc::new(vec![1.0; ELEMENTS]);
    let retention = Retention { keep: NonZeroU32::MIN, keep_every: 0 };
    // Makes the highest what is there now.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = memory("VmRSS");
    let mut writer = Writer::start(location, retention, Tuning::within(BOUND)).unwrap();
    writer.submit(snapshot(&values)).unwrap();
    writer.finish(PATIENCE).unwrap();
    memory("VmHWM").saturating_sub(before)
}

#[test]
fn writing_stays_within_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let slow = Slow(LocalFileSystem::new_with_prefix(folder.path()).unwrap());
    let other = tempfile::tempdir().unwrap();
    let mut places = vec![
        Location::given("memory://slow", Arc::new(slow)),
        Location::parse(other.path().to_str().unwrap()).unwrap(),
    ];
    // A real server, where there is one.
    places.extend(
        std::env::var("MATTOCK_TEST_S3_URL")
            .ok()
            .map(|url| Location::parse(&format!("{url}/memory")).unwrap()),
    );
    for place in places {
        let grown = growth(&place);
        println!("{place}: {} MiB", grown >> 20);
        // Less than two parts would say that nothing was measured.
        assert!(grown >= 16 << 20, "{place}: {} MiB", grown >> 20);
        assert!(grown <= BOUND + BESIDE, "{place}: {} MiB beside the state", grown >> 20);
    }
}
