//! A store that misbehaves at the nth write: a decorator of the store contract.
//!
//! Writes are counted over puts, creations of uploads, their parts, their completions and deletions.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use mattock_checkpoint::Location;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use tokio::sync::Semaphore;

/// What goes wrong.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Once: answers 503 and does nothing.
    Busy,
    /// Once: does it, then answers 500.
    LostReply,
    /// Once, if it is the completion of an upload: does it, then says that there is no such upload.
    ForgetsUpload,
    /// Once: keeps half of the bytes and says that all is well.
    Truncates,
    /// From then on: no space.
    Full,
    /// From then on: nothing works, as if the process had been killed there.
    Dead,
    /// Once: does it, and from then on nothing works.
    DeadAfter,
    /// Once: never answers.
    Hangs,
    /// Once: says that it was reached, and waits until it is let on.
    Gate(Arc<Semaphore>),
    /// Once: does it, loses the reply, and is asked again, as a client does after a 5xx.
    AsksTwice,
    /// From then on: creates what is there already, as servers do that ignore `If-None-Match`.
    Unconditional,
}

#[derive(Debug, Clone)]
pub(crate) struct Faulty {
    inner: Arc<dyn ObjectStore>,
    plan: Arc<Plan>,
}

#[derive(Debug)]
struct Plan {
    fault: Fault,
    /// The write at which it happens, from 1.
    at: usize,
    writes: AtomicUsize,
    sent_bytes: AtomicUsize,
    reached: mpsc::SyncSender<()>,
}

/// One write.
struct Write<'a> {
    plan: &'a Plan,
    number: usize,
}

impl Faulty {
    /// Also gives a channel that tells when the fault happens.
    pub(crate) fn over(inner: Arc<dyn ObjectStore>, fault: Fault, at: usize) -> (Faulty, mpsc::Receiver<()>) {
        let (reached, when) = mpsc::sync_channel(10_000);
        let plan = Arc::new(Plan {
            fault,
            at,
            writes: AtomicUsize::new(0),
            sent_bytes: AtomicUsize::new(0),
            reached,
        });
        (Faulty { inner, plan }, when)
    }

    pub(crate) fn location(&self) -> Location {
        Location::given("memory://faulty", Arc::new(self.clone()))
    }

    /// Bytes of all puts and parts so far.
    pub(crate) fn sent_bytes(&self) -> usize {
        self.plan.sent_bytes.load(Ordering::SeqCst)
    }

    /// Whether the fault has happened.
    pub(crate) fn happened(&self) -> bool {
        self.plan.writes.load(Ordering::SeqCst) >= self.plan.at
    }
}

impl Plan {
    fn begin(&self) -> Write<'_> {
        Write { plan: self, number: self.writes.fetch_add(1, Ordering::SeqCst) + 1 }
    }
}

impl Write<'_> {
    fn payload(&self, payload: PutPayload) -> PutPayload {
        self.plan.sent_bytes.fetch_add(payload.content_length(), Ordering::SeqCst);
        match self.plan.fault {
            Fault::Truncates if self.number == self.plan.at => {
                let whole: Vec<u8> = payload.iter().flatten().copied().collect();
                whole[..whole.len() / 2].to_vec().into()
            }
            _ => payload,
        }
    }

    async fn run<T>(self, effect: impl Future<Output = Result<T>>) -> Result<T> {
        let Plan { fault, at, reached, .. } = self.plan;
        if self.number < *at {
            return effect.await;
        }
        let _ = reached.try_send(());
        match (fault, self.number == *at) {
            (Fault::Full, _) => Err(generic(std::io::ErrorKind::StorageFull.into())),
            (Fault::Dead, _) | (Fault::DeadAfter, false) => {
                Err(Error::PermissionDenied { path: "here".into(), source: "dead".into() })
            }
            (Fault::DeadAfter, true) => {
                effect.await?;
                Err(Error::PermissionDenied { path: "here".into(), source: "dying".into() })
            }
            (Fault::Busy, true) => Err(generic(std::io::Error::other("503 busy"))),
            (Fault::LostReply, true) => {
                effect.await?;
                Err(generic(std::io::Error::other("500 the reply was lost")))
            }
            (Fault::Hangs, true) => std::future::pending().await,
            (Fault::Gate(gate), true) => {
                gate.acquire().await.expect("the gate is never closed").forget();
                effect.await
            }
            (Fault::Truncates | Fault::ForgetsUpload | Fault::AsksTwice | Fault::Unconditional, _)
            | (_, false) => effect.await,
        }
    }
}

fn generic(source: std::io::Error) -> Error {
    Error::Generic { store: "faulty", source: source.into() }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let write = self.plan.begin();
        let payload = write.payload(payload);
        let mut opts = opts;
        match self.plan.fault {
            Fault::Unconditional if write.number >= self.plan.at => opts.mode = PutMode::Overwrite,
            Fault::AsksTwice if write.number == self.plan.at => {
                self.inner.put_opts(location, payload.clone(), opts.clone()).await?;
            }
            _ => {}
        }
        write.run(self.inner.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let upload = self.plan.begin().run(self.inner.put_multipart_opts(location, opts)).await?;
        Ok(Box::new(FaultyUpload { inner: upload, plan: Arc::clone(&self.plan) }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let delete = move |path: Result<Path>| {
            let this = this.clone();
            async move {
                let path = path?;
                this.plan.begin().run(this.inner.delete(&path)).await.map(|()| path)
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.plan.begin().run(self.inner.copy_opts(from, to, options)).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    plan: Arc<Plan>,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let plan = Arc::clone(&self.plan);
        let number = plan.begin().number;
        let payload = Write { plan: &plan, number }.payload(data);
        let effect = self.inner.put_part(payload);
        Box::pin(async move { Write { plan: &plan, number }.run(effect).await })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let write = self.plan.begin();
        let forgets = matches!(self.plan.fault, Fault::ForgetsUpload) && write.number == self.plan.at;
        let done = write.run(self.inner.complete()).await?;
        match forgets {
            true => Err(Error::NotFound { path: "here".into(), source: "no such upload".into() }),
            false => Ok(done),
        }
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
