//! safetensors files, written and read as a stream: neither side ever holds a file as a whole.
//!
//! A file is the header's length (u64), a JSON header, and the tensors' bytes without gaps. The header's JSON and
//! its inner consistency (no gap, no overlap, sizes that follow from shapes) are the `safetensors` crate's business;
//! what is added here is the bound on its length, the comparison with the model that is asked for, and where in the file
//! each element is.
//!
//! Deliberately absent: other types than F32 in what we write. A reader of it refuses them by name.

use std::collections::HashMap;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::Kind;
use super::entries::{part, split_name};
use super::plan::Extent;
use crate::layout::{Layout, TensorMeta};

/// The format's own limit on a header.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The length before the header.
const LENGTH_BYTES: usize = 8;

/// Why a file's header is not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// Not a safetensors header, or one that contradicts itself or the file's size.
    Malformed(String),
    /// Sound, but of another model: the first difference.
    Differs(String),
}

/// Length and JSON header of a file that holds these F32 tensors in this order.
///
/// Padded with spaces to a multiple of 8, and marked `"format": "pt"`, without which `transformers` refuses a file.
pub(crate) fn header(tensors: impl Iterator<Item = (String, Vec<usize>)>) -> Vec<u8> {
    let mut end = 0;
    let infos = tensors.map(|(name, shape)| {
        let start = end;
        end += shape.iter().product::<usize>() * size_of::<f32>();
        (name, TensorInfo { dtype: Dtype::F32, shape, data_offsets: (start, end) })
    });
    let mark = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(mark), infos.collect()).expect("offsets were counted from the shapes");
    let mut json = serde_json::to_vec(&metadata).expect("names and numbers");
    json.resize(json.len().next_multiple_of(LENGTH_BYTES), b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}

/// Collects a file's header from the chunks it arrives in.
pub(crate) struct HeaderReader {
    file_bytes: u64,
    collected: Vec<u8>,
    any_type: bool,
}

impl HeaderReader {
    pub(crate) fn new(file_bytes: u64) -> HeaderReader {
        HeaderReader { file_bytes, collected: Vec::new(), any_type: false }
    }

    /// Of a file that we did not write: its tensors may have any type.
    pub(crate) fn of_any_type(file_bytes: u64) -> HeaderReader {
        HeaderReader { any_type: true, ..HeaderReader::new(file_bytes) }
    }

    /// Takes a chunk; once the header is whole, gives it with the place of the first byte after it.
    pub(crate) fn push(&mut self, chunk: &[u8]) -> Result<Option<(Metadata, u64)>, HeaderError> {
        let (_, chunk) = self.collect_up_to(LENGTH_BYTES, chunk);
        let Some(length) = self.collected.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u64::from_le_bytes(*length);
        let room = self.file_bytes.saturating_sub(LENGTH_BYTES as u64).min(HEADER_BYTES_MAX);
        if length > room {
            return Err(HeaderError::Malformed(format!(
                "announces a header of {length} bytes where {room} fit"
            )));
        }
        let end = LENGTH_BYTES + length as usize;
        let (whole, _) = self.collect_up_to(end, chunk);
        if !whole {
            return Ok(None);
        }
        let metadata = parse(&self.collected[LENGTH_BYTES..], self.file_bytes - end as u64)?;
        if !self.any_type {
            only_f32(&metadata)?;
        }
        Ok(Some((metadata, end as u64)))
    }

    fn collect_up_to<'a>(&mut self, end: usize, chunk: &'a [u8]) -> (bool, &'a [u8]) {
        let missing = end.saturating_sub(self.collected.len());
        let (ours, rest) = chunk.split_at(missing.min(chunk.len()));
        self.collected.extend_from_slice(ours);
        (self.collected.len() >= end, rest)
    }
}

/// How many tensors the header of a safetensors file names, read in chunks of so many bytes; nothing where the file ends within
/// it. For `tests/fuzz`.
///
/// # Errors
/// Says in words what is wrong with it.
pub fn header_of(file: &[u8], chunk_bytes: usize) -> Result<Option<usize>, String> {
    let mut reader = HeaderReader::new(file.len() as u64);
    for chunk in file.chunks(chunk_bytes.max(1)) {
        match reader.push(chunk) {
            Ok(None) => {}
            Ok(Some((metadata, _))) => return Ok(Some(metadata.tensors().len())),
            Err(HeaderError::Malformed(why) | HeaderError::Differs(why)) => return Err(why),
        }
    }
    Ok(None)
}

fn parse(json: &[u8], data_bytes: u64) -> Result<Metadata, HeaderError> {
    let malformed = |why: String| HeaderError::Malformed(why);
    let metadata: Metadata = serde_json::from_slice(json).map_err(|e| malformed(e.to_string()))?;
    if metadata.data_len() as u64 != data_bytes {
        let want = metadata.data_len();
        return Err(malformed(format!("describes {want} bytes of tensors and is followed by {data_bytes}")));
    }
    Ok(metadata)
}

fn only_f32(metadata: &Metadata) -> Result<(), HeaderError> {
    match metadata.tensors().iter().find(|(_, info)| info.dtype != Dtype::F32) {
        Some((name, info)) => {
            Err(HeaderError::Malformed(format!("tensor {name} is {}, not F32", info.dtype)))
        }
        None => Ok(()),
    }
}

/// Where the elements of a file's tensors lie, if all of them are the layout's.
pub(crate) fn extents(
    metadata: &Metadata,
    data_start: u64,
    (piece, kind): (usize, Kind),
    layout: &Layout,
) -> Result<Vec<Extent>, HeaderError> {
    let arrays = || kind.suffixes().iter().enumerate();
    let tensors = layout.tensors().iter();
    let known: HashMap<String, (usize, &TensorMeta)> = tensors
        .flat_map(|tensor| {
            arrays().map(move |(array, suffix)| (format!("{}{suffix}", tensor.name), (array, tensor)))
        })
        .collect();
    let mut extents = Vec::new();
    for (name, info) in metadata.tensors() {
        let (bare, bracket) =
            if known.contains_key(&name) { (name.as_str(), None) } else { split_name(&name) };
        let Some(&(array, tensor)) = known.get(bare) else {
            return Err(HeaderError::Differs(format!("it has a tensor {name}, which is not wanted")));
        };
        if bracket.is_none() && info.shape != tensor.shape {
            return Err(HeaderError::Differs(other_shape(&name, &info.shape, &tensor.shape)));
        }
        let elements =
            part(tensor, bracket).filter(|part| part.len() == info.shape.iter().product::<usize>());
        let at = data_start + info.data_offsets.0 as u64;
        match elements {
            Some(elements) if at.is_multiple_of(size_of::<f32>() as u64) => {
                extents.push(Extent { piece, at, array, elements });
            }
            _ => return Err(HeaderError::Malformed(format!("tensor {name} has an odd part or place"))),
        }
    }
    Ok(extents)
}

/// Names the first tensor by which weights are not of the model asked for.
pub(crate) fn difference(found: &HashMap<String, Vec<usize>>, layout: &Layout) -> Option<String> {
    for TensorMeta { name, shape, .. } in layout.tensors() {
        match found.get(name) {
            None => return Some(format!("it has no tensor {name}")),
            Some(other) if other != shape => return Some(other_shape(name, other, shape)),
            Some(_) => {}
        }
    }
    let wanted = |name: &&String| layout.tensors().iter().any(|tensor| tensor.name == **name);
    let odd = found.keys().filter(|name| !wanted(name)).min()?;
    Some(format!("it has a tensor {odd}, which is not wanted"))
}

fn other_shape(name: &str, found: &[usize], wanted: &[usize]) -> String {
    format!("its {name} has shape {found:?}, wanted is {wanted:?}")
}

#[cfg(test)]
#[path = "safetensors_tests.rs"]
mod tests;
