//! safetensors files, written and read as a stream: neither side ever holds a file as a whole.
//!
//! A file is the header's length (u64), a JSON header, and the tensors' bytes without gaps. The header's JSON and
//! its inner consistency (no gap, no overlap, sizes that follow from shapes) are the `safetensors` crate's business;
//! what is added here is the bound on its length, the comparison with the model that is asked for, and the way from
//! bytes in file order to elements of flat arrays.
//!
//! Deliberately absent: other types than F32. A reader refuses them by name.

use std::collections::HashMap;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

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

/// A tensor that is asked for, and where its elements go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Index of the flat array.
    pub(crate) array: usize,
    /// First element in that array.
    pub(crate) offset: usize,
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
}

impl HeaderReader {
    pub(crate) fn new(file_bytes: u64) -> HeaderReader {
        HeaderReader { file_bytes, collected: Vec::new() }
    }

    /// Takes a chunk; once the header is whole, gives it with what of the chunk lies beyond it.
    pub(crate) fn push<'a>(&mut self, chunk: &'a [u8]) -> Result<Option<(Metadata, &'a [u8])>, HeaderError> {
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
        let (whole, rest) = self.collect_up_to(end, chunk);
        if !whole {
            return Ok(None);
        }
        let metadata = parse(&self.collected[LENGTH_BYTES..], self.file_bytes - end as u64)?;
        Ok(Some((metadata, rest)))
    }

    fn collect_up_to<'a>(&mut self, end: usize, chunk: &'a [u8]) -> (bool, &'a [u8]) {
        let missing = end.saturating_sub(self.collected.len());
        let (ours, rest) = chunk.split_at(missing.min(chunk.len()));
        self.collected.extend_from_slice(ours);
        (self.collected.len() >= end, rest)
    }
}

fn parse(json: &[u8], data_bytes: u64) -> Result<Metadata, HeaderError> {
    let malformed = |why: String| HeaderError::Malformed(why);
    let metadata: Metadata = serde_json::from_slice(json).map_err(|e| malformed(e.to_string()))?;
    if metadata.data_len() as u64 != data_bytes {
        let want = metadata.data_len();
        return Err(malformed(format!("describes {want} bytes of tensors and is followed by {data_bytes}")));
    }
    match metadata.tensors().iter().find(|(_, info)| info.dtype != Dtype::F32) {
        Some((name, info)) => Err(malformed(format!("tensor {name} is {}, not F32", info.dtype))),
        None => Ok(metadata),
    }
}

/// Names the first tensor by which the file is not of the model asked for.
fn compare(metadata: &Metadata, wanted: &[Wanted]) -> Result<(), HeaderError> {
    let differs = |why: String| Err(HeaderError::Differs(why));
    for Wanted { name, shape, .. } in wanted {
        match metadata.info(name) {
            None => return differs(format!("it has no tensor {name}")),
            Some(info) if info.shape != *shape => {
                return differs(format!("its {name} has shape {:?}, wanted is {shape:?}", info.shape));
            }
            Some(_) => {}
        }
    }
    let known = |name: &String| wanted.iter().any(|tensor| tensor.name == *name);
    match metadata.tensors().len() > wanted.len() {
        true => match metadata.offset_keys().into_iter().find(|name| !known(name)) {
            Some(name) => differs(format!("it has a tensor {name}, which is not wanted")),
            None => Ok(()),
        },
        false => Ok(()),
    }
}

/// Scatters a file's bytes, as they arrive, over flat arrays.
pub(crate) struct TensorReader {
    wanted: Vec<Wanted>,
    arrays: Vec<Vec<f32>>,
    phase: Phase,
}

enum Phase {
    Header(HeaderReader),
    Body(Cursor),
}

/// Where in the file's order of elements the stream is.
struct Cursor {
    /// (array, first element, elements) of each tensor in file order, the next one last.
    ahead: Vec<(usize, usize, usize)>,
    /// The first bytes of an element that was cut by a chunk's end.
    cut: Vec<u8>,
}

impl TensorReader {
    /// Reads a file of `file_bytes` into `arrays` zeroed arrays of `elements` each.
    pub(crate) fn new(wanted: Vec<Wanted>, arrays: usize, elements: usize, file_bytes: u64) -> TensorReader {
        let phase = Phase::Header(HeaderReader::new(file_bytes));
        TensorReader { wanted, arrays: vec![vec![0.0; elements]; arrays], phase }
    }

    /// Takes the next chunk of the file.
    pub(crate) fn push(&mut self, chunk: &[u8]) -> Result<(), HeaderError> {
        let mut data = chunk;
        if let Phase::Header(header) = &mut self.phase {
            let Some((metadata, rest)) = header.push(chunk)? else { return Ok(()) };
            compare(&metadata, &self.wanted)?;
            self.phase = Phase::Body(Cursor::new(&metadata, &self.wanted));
            data = rest;
        }
        match &mut self.phase {
            Phase::Body(cursor) => cursor.scatter(data, &mut self.arrays),
            Phase::Header(_) => {}
        }
        Ok(())
    }

    /// The arrays, if every tensor has arrived.
    pub(crate) fn finish(self) -> Result<Vec<Vec<f32>>, HeaderError> {
        match self.phase {
            Phase::Body(cursor) if cursor.ahead.is_empty() && cursor.cut.is_empty() => Ok(self.arrays),
            Phase::Body(_) | Phase::Header(_) => Err(HeaderError::Malformed("ends too early".into())),
        }
    }
}

impl Cursor {
    fn new(metadata: &Metadata, wanted: &[Wanted]) -> Cursor {
        let by_name: HashMap<&str, &Wanted> =
            wanted.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let in_file_order = metadata.offset_keys();
        let targets = in_file_order.iter().rev().filter_map(|name| by_name.get(name.as_str()));
        let ahead = targets.map(|tensor| (tensor.array, tensor.offset, tensor.shape.iter().product()));
        Cursor { ahead: ahead.filter(|&(_, _, elements)| elements > 0).collect(), cut: Vec::new() }
    }

    fn scatter(&mut self, mut data: &[u8], arrays: &mut [Vec<f32>]) {
        const SIZE: usize = size_of::<f32>();
        if !self.cut.is_empty() {
            let (ours, rest) = data.split_at((SIZE - self.cut.len()).min(data.len()));
            self.cut.extend_from_slice(ours);
            data = rest;
            if self.cut.len() < SIZE {
                return;
            }
            let whole = std::mem::take(&mut self.cut);
            self.scatter_whole(&whole, arrays);
        }
        let (whole, cut) = data.split_at(data.len() / SIZE * SIZE);
        self.scatter_whole(whole, arrays);
        self.cut.extend_from_slice(cut);
    }

    /// Bytes beyond the last tensor cannot come: the header was checked against the file's size.
    fn scatter_whole(&mut self, mut data: &[u8], arrays: &mut [Vec<f32>]) {
        while let (Some((array, start, left)), false) = (self.ahead.last_mut(), data.is_empty()) {
            let count = (*left).min(data.len() / size_of::<f32>());
            let (now, rest) = data.split_at(count * size_of::<f32>());
            let target = &mut arrays[*array][*start..*start + count];
            for (element, bytes) in target.iter_mut().zip(now.as_chunks().0) {
                *element = f32::from_le_bytes(*bytes);
            }
            (*start, *left, data) = (*start + count, *left - count, rest);
            if *left == 0 {
                self.ahead.pop();
            }
        }
    }
}

#[cfg(test)]
#[path = "safetensors_tests.rs"]
mod tests;
