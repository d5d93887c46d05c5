//! Weights as other programs write them: `model.safetensors`, or several files and an index, and no manifest.
//!
//! Nothing vouches for such files, so all that they say is compared: with each other, with their sizes, and with the
//! tensors that are asked for, before anything is read. They are read as a stream; F16 and BF16 become F32, which
//! loses nothing.
//!
//! Deliberately absent: what tensors are called by elsewhere. The caller says which of its own a name stands for.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::{ControlFlow, Range};

use half::{bf16, f16};
use safetensors::Dtype;
use serde::Deserialize;

use crate::format::safetensors::{HeaderError, HeaderReader};
use crate::format::{INDEX, MODEL};
use crate::layout::Layout;
use crate::location::Location;
use crate::objects::Objects;
use crate::store_error::StoreError;

/// The longest configuration or index that is read.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// Why weights of another program cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is there is not what it should be.
    #[error("{url}: {why}")]
    Content {
        /// The file, or the folder.
        url: String,
        /// What is wrong with it.
        why: String,
    },
}

/// A folder of weights whose headers are known.
pub struct Foreign {
    objects: Objects,
    files: Vec<File>,
}

struct File {
    name: String,
    bytes: u64,
    tensors: Vec<Tensor>,
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    /// Where it lies in the file.
    bytes: Range<u64>,
}

/// What is read of an index.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Foreign {
    /// Whether a location itself has weights, or an index of them, rather than checkpoints in folders of their own.
    ///
    /// # Errors
    /// Where the store fails.
    pub fn is_at(location: &Location) -> Result<bool, StoreError> {
        let objects = Objects::open(location)?;
        Ok(objects.size(MODEL)?.is_some() || objects.size(INDEX)?.is_some())
    }

    /// Reads the headers of all files in a folder; `model.safetensors` comes before an index, as elsewhere.
    ///
    /// # Errors
    /// Where the folder or a file is not there, or a file contradicts itself, its size or the index.
    pub fn open(location: &Location) -> Result<Foreign, ForeignError> {
        let mut foreign = Foreign { objects: Objects::open(location)?, files: Vec::new() };
        if foreign.objects.size(MODEL)?.is_some() {
            let file = foreign.header(MODEL)?;
            foreign.files.push(file);
            return Ok(foreign);
        }
        if foreign.objects.size(INDEX)?.is_none() {
            return Err(
                foreign.wrong("", format!("it has neither {MODEL} nor {INDEX}: give the folder that has"))
            );
        }
        let index: Index = serde_json::from_str(&foreign.text(INDEX)?)
            .map_err(|error| foreign.wrong(INDEX, error.to_string()))?;
        let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, file) in &index.weight_map {
            by_file.entry(file).or_default().push(tensor);
        }
        for (name, tensors) in by_file {
            let file = foreign.indexed(name, &tensors)?;
            foreign.files.push(file);
        }
        Ok(foreign)
    }

    /// A small file of the folder.
    ///
    /// # Errors
    /// Where it is not there, is too long, or is no text.
    pub fn text(&self, name: &str) -> Result<String, ForeignError> {
        match self.objects.size(name)? {
            None => return Err(self.wrong(name, "it is not there")),
            Some(bytes) if bytes > TEXT_BYTES_MAX => {
                return Err(self.wrong(name, format!("{bytes} bytes; at most {TEXT_BYTES_MAX} are read")));
            }
            Some(_) => {}
        }
        let mut text = Vec::new();
        self.objects.read(name, &mut |chunk| {
            text.extend_from_slice(chunk);
            if text.len() as u64 > TEXT_BYTES_MAX {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        String::from_utf8(text).map_err(|error| self.wrong(name, error))
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.files.iter().flat_map(|file| &file.tensors).any(|tensor| tensor.name == name)
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> usize {
        let tensors = self.files.iter().flat_map(|file| &file.tensors);
        let elements =
            tensors.map(|tensor| tensor.shape.iter().fold(1, |all: usize, &dim| all.saturating_mul(dim)));
        elements.fold(0, usize::saturating_add)
    }

    /// Whether the tensors are those of a layout, each once and with its shape; `meaning` says which of the layout's
    /// tensors a name stands for, `None` where it is to be passed over.
    ///
    /// # Errors
    /// The first difference, with the tensor's name.
    pub fn check(
        &self,
        layout: &Layout,
        meaning: impl Fn(&str) -> Option<String>,
    ) -> Result<(), ForeignError> {
        self.places(layout, meaning).map(drop)
    }

    /// The elements of a layout's flat space, those outside every tensor zero; and [`Foreign::hash`] of what was read.
    ///
    /// # Errors
    /// As [`Foreign::check`], and where a file cannot be read to its end.
    pub fn load(
        &self,
        layout: &Layout,
        meaning: impl Fn(&str) -> Option<String>,
    ) -> Result<(Vec<f32>, String), ForeignError> {
        let places = self.places(layout, meaning)?;
        let mut flat = vec![0.0; layout.elements()];
        let mut fillings: Vec<Filling> =
            places.into_iter().map(|runs| Filling { runs: runs.into(), at: 0, held: Vec::new() }).collect();
        let hash = self.read(|file, chunk| fillings[file].take(chunk, &mut flat))?;
        Ok((flat, hash))
    }

    /// BLAKE3 (hex) over the bytes of all files, in the order of their names.
    ///
    /// # Errors
    /// Where a file cannot be read to its end.
    pub fn hash(&self) -> Result<String, ForeignError> {
        self.read(|_, _| {})
    }

    /// Hands all bytes of all files to `take`, with the file's index; returns their hash.
    fn read(&self, mut take: impl FnMut(usize, &[u8])) -> Result<String, ForeignError> {
        let mut hasher = blake3::Hasher::new();
        for (index, file) in self.files.iter().enumerate() {
            let before = hasher.count();
            self.objects.read(&file.name, &mut |chunk| {
                hasher.update(chunk);
                take(index, chunk);
                ControlFlow::Continue(())
            })?;
            let came = hasher.count() - before;
            if came != file.bytes {
                let why = format!("{came} bytes came of the {} it had when it was opened", file.bytes);
                return Err(self.wrong(&file.name, why));
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// A file that an index names, with the tensors that it should have.
    fn indexed(&self, name: &str, tensors: &[&str]) -> Result<File, ForeignError> {
        if name.contains(['/', '\\']) || !name.ends_with(".safetensors") {
            return Err(
                self.wrong(INDEX, format!("it names {name:?}, which is no safetensors file beside it"))
            );
        }
        if self.objects.size(name)?.is_none() {
            return Err(self.wrong(INDEX, format!("it names {name}, which is not there")));
        }
        let file = self.header(name)?;
        let held = |name: &str| file.tensors.iter().any(|tensor| tensor.name == name);
        if let Some(missing) = tensors.iter().find(|tensor| !held(tensor)) {
            return Err(self.wrong(name, format!("it has no tensor {missing}, which {INDEX} says is in it")));
        }
        if let Some(odd) = file.tensors.iter().find(|tensor| !tensors.contains(&tensor.name.as_str())) {
            return Err(self.wrong(name, format!("it has a tensor {}, which {INDEX} has not here", odd.name)));
        }
        Ok(file)
    }

    fn header(&self, name: &str) -> Result<File, ForeignError> {
        let bytes = self.objects.size(name)?.unwrap_or_default();
        let mut reader = HeaderReader::of_any_type(bytes);
        let mut read = Ok(None);
        self.objects.read(name, &mut |chunk| {
            read = reader.push(chunk);
            if matches!(read, Ok(None)) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        let (metadata, start) = match read {
            Ok(Some(header)) => header,
            Ok(None) => return Err(self.wrong(name, "it ends within its header: it was cut short")),
            Err(HeaderError::Malformed(why) | HeaderError::Differs(why)) => return Err(self.wrong(name, why)),
        };
        let tensor = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
            let at = |offset: usize| start + offset as u64;
            let bytes = at(info.data_offsets.0)..at(info.data_offsets.1);
            Tensor { name, shape: info.shape.clone(), dtype: info.dtype, bytes }
        };
        let tensors = metadata.tensors().into_iter().map(tensor).collect();
        Ok(File { name: name.to_owned(), bytes, tensors })
    }

    /// Of each file, what is read of it, in the order of the file.
    fn places(
        &self,
        layout: &Layout,
        meaning: impl Fn(&str) -> Option<String>,
    ) -> Result<Vec<Vec<Run>>, ForeignError> {
        let known: HashMap<&str, _> =
            layout.tensors().iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let mut found: HashMap<String, &str> = HashMap::new();
        let mut places = Vec::with_capacity(self.files.len());
        for file in &self.files {
            let mut runs = Vec::new();
            for Tensor { name, shape, dtype, bytes } in &file.tensors {
                let Some(wanted) = meaning(name) else { continue };
                let wrong = |why: String| Err(self.wrong(&file.name, why));
                let Some(tensor) = known.get(wanted.as_str()) else {
                    return wrong(format!("it has a tensor {name}, which the model has not"));
                };
                if *shape != tensor.shape {
                    return wrong(format!(
                        "its {name} has shape {shape:?}, the model's has {:?}",
                        tensor.shape
                    ));
                }
                if width(*dtype).is_none() {
                    return wrong(format!("its {name} is {dtype}: only F32, F16 and BF16 are read"));
                }
                if let Some(other) = found.insert(wanted, name) {
                    return wrong(format!("{name} and {other} are the same tensor of the model"));
                }
                runs.push(Run { bytes: bytes.clone(), dtype: *dtype, to: tensor.offset });
            }
            runs.sort_by_key(|run| run.bytes.start);
            places.push(runs);
        }
        match layout.tensors().iter().find(|tensor| !found.contains_key(&tensor.name)) {
            Some(missing) => Err(self.wrong("", format!("its weights have no tensor {}", missing.name))),
            None => Ok(places),
        }
    }

    /// An error about a file of the folder, or the folder itself.
    fn wrong(&self, name: &str, why: impl ToString) -> ForeignError {
        ForeignError::Content { url: self.objects.url(name), why: why.to_string() }
    }
}

/// Bytes of a number, where the type is read.
fn width(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(size_of::<f32>()),
        Dtype::F16 | Dtype::BF16 => Some(size_of::<f16>()),
        _ => None,
    }
}

/// What of a file goes where.
struct Run {
    /// What is still to come of it.
    bytes: Range<u64>,
    dtype: Dtype,
    /// Index of its next element.
    to: usize,
}

/// A file on its way into the flat space.
struct Filling {
    runs: VecDeque<Run>,
    /// Bytes that came.
    at: u64,
    /// The beginning of an element whose end is in the next chunk.
    held: Vec<u8>,
}

impl Filling {
    fn take(&mut self, chunk: &[u8], flat: &mut [f32]) {
        let start = self.at;
        self.at += chunk.len() as u64;
        while let Some(run) = self.runs.front_mut() {
            let (from, to) = (run.bytes.start.max(start), run.bytes.end.min(self.at));
            if from < to {
                self.held.extend_from_slice(&chunk[(from - start) as usize..(to - start) as usize]);
                run.bytes.start = to;
                let width = width(run.dtype).unwrap_or(size_of::<f32>());
                let whole = self.held.len() / width;
                let target = &mut flat[run.to..run.to + whole];
                match run.dtype {
                    Dtype::F16 => decode(&self.held, target, |two| f16::from_le_bytes(two).to_f32()),
                    Dtype::BF16 => decode(&self.held, target, |two| bf16::from_le_bytes(two).to_f32()),
                    _ => decode(&self.held, target, f32::from_le_bytes),
                }
                run.to += whole;
                self.held.drain(..whole * width);
            }
            if run.bytes.start < run.bytes.end {
                return;
            }
            self.runs.pop_front();
        }
    }
}

fn decode<const W: usize>(bytes: &[u8], target: &mut [f32], number: impl Fn([u8; W]) -> f32) {
    for (element, bytes) in target.iter_mut().zip(bytes.as_chunks().0) {
        *element = number(*bytes);
    }
}

#[cfg(test)]
#[path = "foreign_tests.rs"]
mod tests;
