//! Reading a checkpoint's pieces: in ranges, several under way, hashed and handed on in order.
//!
//! Nothing that was read is believed before the whole piece's hash holds; until then it only fills arrays that
//! are thrown away if it does not.

use std::ops::Range;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;

use crate::flaw::Flaw;
use crate::format::manifest::{Manifest, PieceInfo};
use crate::format::safetensors::{HeaderError, HeaderReader, TensorReader, Wanted};
use crate::format::{CONFIG, EXPONENTS, M, MODEL, OPTIMIZER, RECIPE, TOKENIZER, V, exponents, step_folder};
use crate::layout::Layout;
use crate::snapshot::Files;
use crate::store::Store;
use crate::store_error::StoreError;

/// Bytes of one request.
const RANGE_BYTES: u64 = 8 << 20;
/// Requests under way; with [`RANGE_BYTES`] the bound on memory beside the arrays.
const RANGES_IN_FLIGHT: usize = 4;
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
}

impl Checkpoint<'_> {
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

    /// Parameters, flat.
    pub(crate) async fn params(&self, layout: &Layout) -> Result<Vec<f32>, ReadError> {
        let [params] = self.arrays(MODEL, layout, [""]).await?;
        Ok(params)
    }

    /// First and second moments, flat.
    pub(crate) async fn moments(&self, layout: &Layout) -> Result<[Vec<f32>; 2], ReadError> {
        self.arrays(OPTIMIZER, layout, [M, V]).await
    }

    /// Block exponents.
    pub(crate) async fn exponents(&self, layout: &Layout) -> Result<Vec<i16>, ReadError> {
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
        let mut sound = Ok(());
        self.stream(info, |chunk| match header.as_mut().map(|reader| reader.push(chunk)) {
            Some(Ok(None)) | None => {}
            Some(Ok(Some(_))) => header = None,
            Some(Err(error)) => (sound, header) = (Err(error), None),
        })
        .await?;
        sound.map_err(|error| self.judge(&info.name, error, true))
    }

    async fn arrays<const N: usize>(
        &self,
        name: &str,
        layout: &Layout,
        suffixes: [&str; N],
    ) -> Result<[Vec<f32>; N], ReadError> {
        let info = self.need(name)?;
        let same_model = self.manifest.model == layout.fingerprint();
        let mut reader = TensorReader::new(wanted(layout, &suffixes), N, layout.elements(), info.bytes);
        let mut sound = Ok(());
        self.stream(info, |chunk| {
            if sound.is_ok() {
                sound = reader.push(chunk);
            }
        })
        .await?;
        let arrays =
            sound.and_then(|()| reader.finish()).map_err(|error| self.judge(name, error, same_model))?;
        match same_model {
            true => Ok(arrays.try_into().expect("as many arrays as were asked for")),
            false => Err(ReadError::OtherModel("its tensors lie elsewhere in the flat space".into())),
        }
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

    /// Hands a piece's bytes to `take` in order; errors if in the end they are not those of the manifest.
    async fn stream(&self, info: &PieceInfo, mut take: impl FnMut(&[u8])) -> Result<(), ReadError> {
        let (name, path) = self.place(info);
        let flaw = |flaw: fn(String) -> Flaw| ReadError::Flaw(flaw(info.name.clone()));
        let Some(got) = self.store.size(&name).await? else {
            return Err(flaw(|piece| Flaw::Missing { piece }));
        };
        if got != info.bytes {
            return Err(Flaw::Size { piece: info.name.clone(), want: info.bytes, got }.into());
        }
        let inner = self.store.inner();
        let requests = ranges(info.bytes).map(|range| inner.get_range(&path, range));
        let mut chunks = futures::stream::iter(requests).buffered(RANGES_IN_FLIGHT);
        let mut hasher = blake3::Hasher::new();
        while let Some(chunk) =
            chunks.try_next().await.map_err(|error| self.store.error("read", &name, error))?
        {
            hasher.update(&chunk);
            take(&chunk);
        }
        match hasher.count() == info.bytes && hasher.finalize().to_hex().as_str() == info.blake3 {
            true => Ok(()),
            false => Err(flaw(|piece| Flaw::Hash { piece })),
        }
    }

    fn place(&self, info: &PieceInfo) -> (String, object_store::path::Path) {
        let name = format!("{}/{}", step_folder(self.manifest.step), info.name);
        let path = self.store.path(&name);
        (name, path)
    }
}

fn wanted(layout: &Layout, suffixes: &[&str]) -> Vec<Wanted> {
    let per_array = suffixes.iter().enumerate();
    let each = per_array.flat_map(|array| layout.tensors().iter().map(move |tensor| (array, tensor)));
    each.map(|((array, suffix), tensor)| Wanted {
        name: format!("{}{suffix}", tensor.name),
        shape: tensor.shape.clone(),
        array,
        offset: tensor.offset,
    })
    .collect()
}

fn ranges(bytes: u64) -> impl Iterator<Item = Range<u64>> {
    (0..bytes.div_ceil(RANGE_BYTES)).map(move |n| n * RANGE_BYTES..((n + 1) * RANGE_BYTES).min(bytes))
}
