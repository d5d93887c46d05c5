//! Reading a checkpoint's pieces: in chunks, several under way, each checked by its hash.
//!
//! A piece whose manifest has hashes of its chunks is read where it is needed, in any order. One without (it has one chunk,
//! or was written by an earlier program) is read as a whole, and not believed before its hash holds; until then it only
//! fills arrays that are thrown away if it does not.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{GetOptions, GetResultPayload, ObjectStore};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::buffers::Buffers;
use crate::flaw::Flaw;
use crate::format::manifest::{Manifest, PieceInfo, as_ranges};
use crate::format::plan::{Extent, Fill, Reads, Wanted, by_chunk, place, plan, wanted};
use crate::format::safetensors::{HeaderError, HeaderReader, difference, extents};
use crate::format::{CONFIG, Digest, EXPONENTS, Kind, MANIFEST, RECIPE, TOKENIZER, exponents, step_folder};
use crate::layout::Layout;
use crate::slices::{common, normal};
use crate::snapshot::Files;
use crate::store::Store;
use crate::store_error::StoreError;
use crate::stretch::{Filling, Stretch};

/// Bytes of one request, and of a chunk that is hashed by itself.
pub(crate) const CHUNK_BYTES: u64 = 8 << 20;
/// Requests under way of a checkpoint, whatever is read of it at the same time; with the next two and [`CHUNK_BYTES`] the bound on
/// memory beside the arrays.
const CHUNKS_IN_FLIGHT: usize = 4;
/// Chunks that are checked and put in their places meanwhile, of each kind.
const CHUNKS_CHECKED: usize = 2;
/// First chunks of files that are kept once the header is read, of each kind; of other files they are read again.
const FIRST_CHUNKS_KEPT: usize = 4;
/// Chunks that are read of a piece before it is used again.
const SAMPLE_CHUNKS: u64 = 4;
/// The longest `config.json`, tokenizer or recipe that is read.
const SMALL_BYTES_MAX: u64 = 256 << 20;

/// Why a piece could not be read.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The store failed: says nothing about the checkpoint.
    Store(StoreError),
    /// The checkpoint is not whole.
    Flaw(Flaw),
    /// The checkpoint is sound, but of another model: the first difference.
    OtherModel(String),
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> ReadError {
        ReadError::Store(error)
    }
}

impl From<Flaw> for ReadError {
    fn from(flaw: Flaw) -> ReadError {
        ReadError::Flaw(flaw)
    }
}

/// A checkpoint whose manifest is known.
pub(crate) struct Checkpoint<'a> {
    pub(crate) store: &'a Store,
    pub(crate) manifest: &'a Manifest,
    buffers: Buffers,
    /// Whoever reads a chunk has one of these permits.
    requests: Semaphore,
}

/// A state's arrays: parameters and both moments, of the ranges that were asked for, and exponents.
pub(crate) struct Tensors {
    pub(crate) params: Vec<f32>,
    pub(crate) moments: [Vec<f32>; 2],
    pub(crate) exponents: Vec<i16>,
}

impl<'a> Checkpoint<'a> {
    pub(crate) fn new(store: &'a Store, manifest: &'a Manifest) -> Self {
        Self { store, manifest, buffers: Buffers::default(), requests: Semaphore::new(CHUNKS_IN_FLIGHT) }
    }

    /// The small files.
    pub(crate) async fn files(&self) -> Result<Files, ReadError> {
        let config_json = self.small(self.need(CONFIG)?).await?;
        let mut optional = [None, None];
        for (file, name) in optional.iter_mut().zip([TOKENIZER, RECIPE]) {
            if let Some(info) = self.manifest.piece(name) {
                *file = Some(self.small(info).await?);
            }
        }
        let [tokenizer_json, recipe_toml] = optional;
        Ok(Files { config_json, tokenizer_json, recipe_toml })
    }

    /// Parameters and moments of these ranges, which are read at the same time, and exponents.
    pub(crate) async fn tensors(
        &self,
        layout: &Layout,
        params: &[Range<usize>],
        moments: &[Range<usize>],
    ) -> Result<Tensors, ReadError> {
        self.of_model(layout).await?;
        let (mut params, moments) = tokio::try_join!(
            self.arrays(Kind::Weights, layout, params),
            self.arrays(Kind::Moments, layout, moments)
        )?;
        let moments = moments.try_into().expect("two arrays of moments");
        Ok(Tensors { params: params.remove(0), moments, exponents: self.exponents(layout).await? })
    }

    /// Parameters of these ranges.
    pub(crate) async fn params(
        &self,
        layout: &Layout,
        ranges: &[Range<usize>],
    ) -> Result<Vec<f32>, ReadError> {
        self.of_model(layout).await?;
        Ok(self.arrays(Kind::Weights, layout, ranges).await?.remove(0))
    }

    async fn of_model(&self, layout: &Layout) -> Result<(), ReadError> {
        if self.manifest.model == layout.fingerprint() {
            return Ok(());
        }
        let difference = self.difference(layout).await?;
        let elsewhere = || "its tensors lie elsewhere in the flat space".to_owned();
        Err(ReadError::OtherModel(difference.unwrap_or_else(elsewhere)))
    }

    /// Elements of the parameters, or of both moments: as many arrays as the kind has, of these ranges' elements.
    async fn arrays(
        &self,
        kind: Kind,
        layout: &Layout,
        ranges: &[Range<usize>],
    ) -> Result<Vec<Vec<f32>>, ReadError> {
        let ranges = normal(ranges.to_vec());
        let arrays = kind.suffixes().len();
        let wanted: Vec<Wanted> = (0..arrays).flat_map(|array| wanted(layout, array, &ranges)).collect();
        let mut headers = self.headers(kind, layout, &ranges).await?;
        let content = |why| Flaw::Content { piece: MANIFEST.into(), why: format!("{}: {why}", kind.stem()) };
        let copies = plan(std::mem::take(&mut headers.extents), &wanted).map_err(content)?;
        let reads = by_chunk(&copies, |piece| chunk_bytes(&self.manifest.pieces[piece]));
        let elements = ranges.iter().map(Range::len).sum();
        // In small pages, which are filled as soon as they are made. Large ones cost a virtual machine four times that where its host
        // has taken memory back.
        let empty = || Filling::new(vec![0.0; elements]);
        let (filling, room): (Vec<_>, Vec<_>) = (0..arrays).map(|_| empty()).unzip();
        let reads = divide(reads, room).ok_or_else(|| content("elements have two places".to_owned()))?;
        self.fill(reads, headers).await?;
        let filled = filling.into_iter().map(|array| array.done().expect("all of them are filled"));
        Ok(filled.collect())
    }

    /// Block exponents.
    async fn exponents(&self, layout: &Layout) -> Result<Vec<i16>, ReadError> {
        let info = self.need(EXPONENTS)?;
        let most = (exponents::HEADER_BYTES + layout.elements() * size_of::<i16>()) as u64;
        let content = |why| Flaw::Content { piece: EXPONENTS.into(), why };
        if info.bytes > most {
            return Err(content(format!("{} bytes of exponents for so small a model", info.bytes)).into());
        }
        Ok(exponents::decode(&self.whole(info).await?).map_err(content)?)
    }

    /// Reads a piece to its end and checks all that can be checked without a model.
    pub(crate) async fn check(&self, info: &PieceInfo) -> Result<(), ReadError> {
        if info.name == EXPONENTS {
            let decoded = exponents::decode(&self.whole(info).await?);
            let content = |why| Flaw::Content { piece: info.name.clone(), why };
            return Ok(decoded.map(drop).map_err(content)?);
        }
        let mut header = info.name.ends_with(".safetensors").then(|| HeaderReader::new(info.bytes));
        if let Some(got) = self.store.size(&self.place(info).0).await?.filter(|&got| got != info.bytes) {
            return Err(Flaw::Size { piece: info.name.clone(), want: info.bytes, got }.into());
        }
        let mut sound = Ok(());
        self.stream(info, |chunk| match header.as_mut().map(|reader| reader.push(chunk)) {
            Some(Ok(None)) | None => {}
            Some(Ok(Some(_))) => header = None,
            Some(Err(error)) => (sound, header) = (Err(error), None),
        })
        .await?;
        sound.map_err(|error| self.judge(&info.name, error, true))
    }

    /// Pieces of that kind that hold any of these elements; all that do not say what they hold.
    fn pieces_with(&self, kind: Kind, ranges: &[Range<usize>]) -> Vec<usize> {
        let needed = |info: &PieceInfo| {
            let holds = as_ranges(&info.holds);
            holds.is_empty()
                || holds.iter().any(|held| ranges.iter().any(|range| common(held, range).is_some()))
        };
        let pieces = self.manifest.pieces.iter().enumerate();
        let found = pieces.filter(|(_, info)| Kind::of(&info.name) == Some(kind) && needed(info));
        found.map(|(piece, _)| piece).collect()
    }

    /// Reads the headers of the files that hold any of these elements, several at a time.
    async fn headers(
        &self,
        kind: Kind,
        layout: &Layout,
        ranges: &[Range<usize>],
    ) -> Result<Headers, ReadError> {
        let opened = self.pieces_with(kind, ranges).into_iter().map(async |piece| {
            let info = &self.manifest.pieces[piece];
            let (metadata, start, chunk) = self.header(info).await?;
            let extents = extents(&metadata, start, (piece, kind), layout);
            let extents = extents.map_err(|error| self.judge(&info.name, error, true))?;
            Ok::<_, ReadError>((piece, extents, chunk))
        });
        let mut opened = futures::stream::iter(opened).buffered(CHUNKS_IN_FLIGHT);
        let mut headers = Headers::default();
        while let Some((piece, extents, chunk)) = opened.try_next().await? {
            headers.extents.extend(extents);
            if headers.chunks.len() < FIRST_CHUNKS_KEPT {
                headers.chunks.insert(piece, chunk);
            }
        }
        Ok(headers)
    }

    /// A file's header, where its data begin, and the file's first chunk.
    async fn header(
        &self,
        info: &PieceInfo,
    ) -> Result<(safetensors::tensor::Metadata, u64, Bytes), ReadError> {
        let mut header = HeaderReader::new(info.bytes);
        let mut first = None;
        for number in 0..info.bytes.div_ceil(chunk_bytes(info)) {
            let chunk = self.chunk(info, number).await?;
            let read = header.push(&chunk).map_err(|error| self.judge(&info.name, error, true))?;
            let first = first.get_or_insert(chunk);
            if let Some((metadata, start)) = read {
                return Ok((metadata, start, first.clone()));
            }
        }
        let why = "ends within its header".to_owned();
        Err(Flaw::Content { piece: info.name.clone(), why }.into())
    }

    /// The first difference between the weights' tensors and a layout's.
    async fn difference(&self, layout: &Layout) -> Result<Option<String>, ReadError> {
        let mut found = HashMap::new();
        for piece in self.pieces_with(Kind::Weights, std::slice::from_ref(&(0..usize::MAX))) {
            let (metadata, ..) = self.header(&self.manifest.pieces[piece]).await?;
            found.extend(metadata.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())));
        }
        Ok(difference(&found, layout))
    }

    /// Reads chunks, several at a time, and copies what is needed of them.
    async fn fill(&self, reads: Vec<Read>, headers: Headers) -> Result<(), ReadError> {
        let of = |piece: usize| &self.manifest.pieces[piece];
        let (apart, whole): (Vec<_>, Vec<_>) =
            reads.into_iter().partition(|read| is_checked_by_chunk(of(read.piece)));
        let chunks = apart.into_iter().map(|Read { piece, number, parts }| {
            let known = headers.chunks.get(&piece).filter(|_| number == 0).cloned();
            async move {
                match known {
                    Some(chunk) => fill_all(&chunk, parts).map_err(|why| content(of(piece), why)),
                    None => {
                        self.chunk_with(of(piece), number, |chunk| fill_all(chunk, parts)).await.map(drop)
                    }
                }
            }
        });
        let mut chunks = futures::stream::iter(chunks).buffer_unordered(CHUNKS_IN_FLIGHT + CHUNKS_CHECKED);
        while chunks.try_next().await?.is_some() {}
        let mut pieces: BTreeMap<usize, BTreeMap<u64, Vec<Part>>> = BTreeMap::new();
        whole.into_iter().for_each(|Read { piece, number, parts }| {
            pieces.entry(piece).or_default().insert(number, parts);
        });
        for (piece, mut parts) in pieces {
            let (mut number, mut run) = (0, Ok(()));
            self.stream(of(piece), |chunk| {
                let parts = parts.remove(&number).unwrap_or_default();
                run = std::mem::replace(&mut run, Ok(())).and_then(|()| fill_all(chunk, parts));
                number += 1;
            })
            .await?;
            run.map_err(|why| content(of(piece), why))?;
        }
        Ok(())
    }

    fn judge(&self, piece: &str, error: HeaderError, same_model: bool) -> ReadError {
        match error {
            HeaderError::Differs(difference) if !same_model => ReadError::OtherModel(difference),
            HeaderError::Differs(why) | HeaderError::Malformed(why) => {
                ReadError::Flaw(Flaw::Content { piece: piece.to_owned(), why })
            }
        }
    }

    fn need(&self, name: &str) -> Result<&PieceInfo, Flaw> {
        self.manifest.piece(name).ok_or_else(|| Flaw::Missing { piece: name.to_owned() })
    }

    async fn small(&self, info: &PieceInfo) -> Result<Bytes, ReadError> {
        if info.bytes > SMALL_BYTES_MAX {
            let why = format!("{} bytes; at most {SMALL_BYTES_MAX} are read", info.bytes);
            return Err(Flaw::Content { piece: info.name.clone(), why }.into());
        }
        Ok(self.whole(info).await?.into())
    }

    async fn whole(&self, info: &PieceInfo) -> Result<Vec<u8>, ReadError> {
        let mut whole = Vec::new();
        self.stream(info, |chunk| whole.extend_from_slice(chunk)).await?;
        Ok(whole)
    }

    /// Hands a piece's chunks to `take` in order; errors if in the end its bytes are not those of the manifest.
    async fn stream(&self, info: &PieceInfo, mut take: impl FnMut(&[u8])) -> Result<(), ReadError> {
        let chunk_bytes = chunk_bytes(info);
        let mut digest =
            Digest::new(info.bytes, info.chunks.as_ref().map_or(u64::MAX, |chunks| chunks.bytes));
        let numbers = 0..info.bytes.div_ceil(chunk_bytes);
        let chunks = numbers.map(async |number| {
            let permit = self.permit().await;
            Ok::<_, ReadError>((self.unchecked(info, number).await?, permit))
        });
        let mut chunks = futures::stream::iter(chunks).buffered(CHUNKS_IN_FLIGHT);
        while let Some((chunk, _permit)) = chunks.try_next().await? {
            digest.update(&chunk);
            take(&chunk);
        }
        let found = digest.finish(info.name.clone(), info.holds.clone());
        match found == *info {
            true => Ok(()),
            false => Err(Flaw::Hash { piece: info.name.clone() }.into()),
        }
    }

    /// One chunk; checked, if there is a hash for it.
    async fn chunk(&self, info: &PieceInfo, number: u64) -> Result<Bytes, ReadError> {
        self.chunk_with(info, number, |_| Ok(())).await
    }

    /// One chunk; handed to `take` once it is checked, if there is a hash for it.
    async fn chunk_with(
        &self,
        info: &PieceInfo,
        number: u64,
        take: impl FnOnce(&[u8]) -> Result<(), String> + Send + 'static,
    ) -> Result<Bytes, ReadError> {
        let permit = self.permit().await;
        let chunk = self.unchecked(info, number).await?;
        drop(permit);
        let want = match &info.chunks {
            Some(chunks) => usize::try_from(number).ok().and_then(|number| chunks.blake3.get(number)),
            None => Some(&info.blake3).filter(|_| is_checked_by_chunk(info)),
        };
        let want = want.cloned();
        // Beside the thread that receives, which would be the limit.
        let work = tokio::task::spawn_blocking(move || {
            let sound = want.is_none_or(|want| blake3::hash(&chunk).to_hex().as_str() == want);
            sound.then(|| take(&chunk).map(|()| chunk))
        });
        match work.await {
            Ok(Some(taken)) => taken.map_err(|why| content(info, why)),
            Ok(None) | Err(_) => Err(Flaw::Hash { piece: info.name.clone() }.into()),
        }
    }

    /// Whether a piece that the manifest names is there and sound, as far as a few of its chunks tell: all, where it has no
    /// more; others each time, where `salt` is another. Without hashes of chunks there is nothing to tell by.
    pub(crate) async fn seems_sound(&self, info: &PieceInfo, salt: u64) -> Result<bool, ReadError> {
        if !is_checked_by_chunk(info) {
            return Ok(false);
        }
        let chunks = info.bytes.div_ceil(chunk_bytes(info));
        let first = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) % chunks.max(1);
        for number in 0..chunks.min(SAMPLE_CHUNKS) {
            match self.chunk(info, (first + number) % chunks).await {
                Ok(_) => {}
                Err(ReadError::Flaw(_)) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Waits until another chunk may be read.
    async fn permit(&self) -> SemaphorePermit<'_> {
        self.requests.acquire().await.expect("nobody closes it")
    }

    async fn unchecked(&self, info: &PieceInfo, number: u64) -> Result<Bytes, ReadError> {
        let (name, path) = self.place(info);
        let start = number * chunk_bytes(info);
        let range = start..(start + chunk_bytes(info)).min(info.bytes);
        let bytes = range.end - range.start;
        let read = together(self.store.inner(), &path, range, &self.buffers).await;
        match read.map_err(|error| self.store.error("read", &name, error)) {
            Ok(chunk) if chunk.len() as u64 == bytes => Ok(chunk),
            Err(error) if error.is_missing() => Err(Flaw::Missing { piece: info.name.clone() }.into()),
            read => match self.store.size(&name).await? {
                Some(got) if got != info.bytes => {
                    Err(Flaw::Size { piece: info.name.clone(), want: info.bytes, got }.into())
                }
                Some(_) => {
                    Err(read.err().map_or(Flaw::Hash { piece: info.name.clone() }.into(), ReadError::Store))
                }
                None => Err(Flaw::Missing { piece: info.name.clone() }.into()),
            },
        }
    }

    fn place(&self, info: &PieceInfo) -> (String, object_store::path::Path) {
        let name = format!("{}/{}", step_folder(self.manifest.step), info.name);
        let path = self.store.path(&name);
        (name, path)
    }
}

/// Bytes of a chunk, and the elements that they are.
type Part = (Range<usize>, Stretch);

/// A chunk to be read, and what of it goes where.
struct Read {
    piece: usize,
    number: u64,
    parts: Vec<Part>,
}

/// Gives each read the elements that it fills, of arrays by number; none where two would fill the same.
fn divide(reads: Reads, mut room: Vec<Stretch>) -> Option<Vec<Read>> {
    let fills = reads.into_iter().flat_map(|(chunk, fills)| fills.into_iter().map(move |fill| (chunk, fill)));
    let mut fills: Vec<((usize, u64), Fill)> = fills.collect();
    fills.sort_by_key(|(_, fill)| (fill.array, fill.to.start));
    let mut divided: BTreeMap<(usize, u64), Vec<Part>> = BTreeMap::new();
    for (chunk, fill) in fills {
        let part = (fill.from, room.get_mut(fill.array)?.take(&fill.to)?);
        divided.entry(chunk).or_default().push(part);
    }
    let reads = divided.into_iter().map(|((piece, number), parts)| Read { piece, number, parts });
    Some(reads.collect())
}

fn fill_all(chunk: &[u8], parts: Vec<Part>) -> Result<(), String> {
    parts.into_iter().try_for_each(|(from, mut to)| place(chunk, &from, to.values()))
}

fn content(info: &PieceInfo, why: String) -> ReadError {
    Flaw::Content { piece: info.name.clone(), why }.into()
}

/// A range of an object, in one piece: what came in many is copied into a buffer that is used again, for a client whose own are held on
/// to makes new ones all the time.
async fn together(
    store: &dyn ObjectStore,
    path: &object_store::path::Path,
    range: Range<u64>,
    buffers: &Buffers,
) -> object_store::Result<Bytes> {
    let wanted = (range.end - range.start) as usize;
    let read = store.get_opts(path, GetOptions { range: Some(range.into()), ..Default::default() }).await?;
    let GetResultPayload::Stream(mut stream) = read.payload else { return read.bytes().await };
    let Some(first) = stream.try_next().await? else { return Ok(Bytes::new()) };
    if first.len() >= wanted {
        return Ok(first);
    }
    let mut lent = buffers.lend(wanted);
    let before = lent.buffer.len();
    lent.buffer.extend_from_slice(&first);
    drop(first);
    while let Some(bytes) = stream.try_next().await? {
        lent.buffer.extend_from_slice(&bytes);
    }
    Ok(lent.bytes().slice(before..))
}

/// What the headers of files of tensors tell.
#[derive(Default)]
struct Headers {
    extents: Vec<Extent>,
    /// First chunks by piece, which were read on the way; of some.
    chunks: HashMap<usize, Bytes>,
}

/// What of a piece is read at a time.
fn chunk_bytes(info: &PieceInfo) -> u64 {
    info.chunks.as_ref().map_or(CHUNK_BYTES, |chunks| chunks.bytes)
}

/// Whether each chunk has a hash: where there is one chunk, that of the whole.
fn is_checked_by_chunk(info: &PieceInfo) -> bool {
    info.chunks.is_some() || info.bytes <= CHUNK_BYTES
}
