//! From the records of all shares to the manifest: pure, so that it is the same whoever does it.
//!
//! # Invariants
//! 1. Records of two attempts make no manifest, nor do some of one.
//! 2. Every element of every tensor is held by exactly one piece of weights, and by exactly one of moments.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;

use super::manifest::{Manifest, PieceInfo, as_ranges};
use super::record::ShareRecord;
use super::{CONFIG, Digest, INDEX, Kind};
use crate::layout::Layout;
use crate::slices::normal;

/// A manifest that may be created, and the index that has to be there before.
#[derive(Debug)]
pub(crate) struct Assembled {
    pub(crate) manifest: Manifest,
    /// `model.safetensors.index.json`.
    pub(crate) index: Vec<u8>,
}

/// Joins the records of an attempt, or says why they are not one checkpoint.
pub(crate) fn assemble(
    key: &str,
    layout: &Layout,
    mut records: Vec<ShareRecord>,
) -> Result<Assembled, String> {
    records.sort_by_key(|record| record.share);
    let Some(first) = records.first() else { return Err("there are no records".into()) };
    let bare = |record: &ShareRecord| ShareRecord { share: 0, pieces: Vec::new(), ..record.clone() };
    if let Some(other) = records.iter().find(|record| record.attempt != key || bare(record) != bare(first)) {
        return Err(format!("the record of share {} is of another attempt", other.share));
    }
    if !records.iter().map(|record| record.share).eq(0..first.of) {
        return Err(format!("{} records of {} shares", records.len(), first.of));
    }
    let mut pieces: Vec<PieceInfo> = records.iter().flat_map(|record| record.pieces.clone()).collect();
    for kind in [Kind::Weights, Kind::Moments] {
        check_tiles(kind, layout, &pieces)?;
    }
    if !pieces.iter().any(|piece| piece.name == CONFIG) {
        return Err(format!("no share wrote {CONFIG}"));
    }
    let index = index(layout, &pieces);
    let mut digest = Digest::new(index.len() as u64, u64::MAX);
    digest.update(&index);
    pieces.push(digest.finish(INDEX.to_owned(), Vec::new()));
    Ok(Assembled { manifest: first.manifest(key.to_owned(), pieces), index })
}

fn check_tiles(kind: Kind, layout: &Layout, pieces: &[PieceInfo]) -> Result<(), String> {
    let pieces = pieces.iter().filter(|piece| Kind::of(&piece.name) == Some(kind));
    let held: Vec<Range<usize>> = pieces.flat_map(|piece| as_ranges(&piece.holds)).collect();
    let elements = |ranges: &[Range<usize>]| ranges.iter().map(|range| range.len() as u128).sum::<u128>();
    let (once, all) = (elements(&held), normal(held));
    if all != normal(layout.tensors().iter().map(|tensor| tensor.span()).collect()) {
        return Err(format!("the shares' {} are not those of all elements", kind.stem()));
    }
    match once == elements(&all) {
        true => Ok(()),
        false => Err(format!("two shares hold {} of the same elements", kind.stem())),
    }
}

/// Which file has which tensor, as Hugging Face's tools want it.
pub(crate) fn index(layout: &Layout, pieces: &[PieceInfo]) -> Vec<u8> {
    let files: Vec<(&str, Vec<Range<usize>>)> = pieces
        .iter()
        .filter(|piece| Kind::of(&piece.name) == Some(Kind::Weights))
        .map(|piece| (piece.name.as_str(), as_ranges(&piece.holds)))
        .collect();
    let holder = |span: &Range<usize>| {
        let holds =
            |ranges: &[Range<usize>]| ranges.iter().any(|r| r.start <= span.start && span.end <= r.end);
        // One without elements is in the first file.
        let found = files.iter().find(|(_, ranges)| !span.is_empty() && holds(ranges)).or(files.first());
        found.map_or("", |&(name, _)| name)
    };
    let weight_map =
        layout.tensors().iter().map(|tensor| (tensor.name.as_str(), holder(&tensor.span()))).collect();
    let elements: usize = layout.tensors().iter().map(|tensor| tensor.elements()).sum();
    let total_size = elements as u64 * size_of::<f32>() as u64;
    let index = Index { metadata: Metadata { total_size }, weight_map };
    let mut json = serde_json::to_vec_pretty(&index).expect("names and a number");
    json.push(b'\n');
    json
}

#[derive(Serialize)]
struct Index<'a> {
    metadata: Metadata,
    weight_map: BTreeMap<&'a str, &'a str>,
}

#[derive(Serialize)]
struct Metadata {
    total_size: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::TensorMeta;

    fn layout() -> Layout {
        let tensor = |name: &str, offset| TensorMeta { name: name.into(), shape: vec![4], offset };
        Layout::new(vec![tensor("a", 0), tensor("b", 8)], 12).unwrap()
    }

    fn piece(name: &str, holds: &[[u64; 2]]) -> PieceInfo {
        let blake3 = blake3::hash(name.as_bytes()).to_hex().to_string();
        PieceInfo { name: name.into(), bytes: 16, blake3, chunks: None, holds: holds.to_vec() }
    }

    fn record(share: u32, pieces: Vec<PieceInfo>) -> ShareRecord {
        ShareRecord {
            format: super::super::FORMAT,
            program: "p".into(),
            run_id: "r".into(),
            attempt: "k".into(),
            share,
            of: 2,
            step: 1,
            total_steps: 2,
            seed: 3,
            state_hash: 4,
            model: "m".into(),
            dataset: "d".into(),
            pieces,
        }
    }

    fn records() -> Vec<ShareRecord> {
        let first = vec![
            piece(CONFIG, &[]),
            piece("model-1.safetensors", &[[0, 4]]),
            piece("optimizer-1.safetensors", &[[0, 2]]),
        ];
        let second = vec![
            piece("model-2.safetensors", &[[8, 12]]),
            piece("optimizer-2.safetensors", &[[2, 4], [8, 12]]),
        ];
        vec![record(0, first), record(1, second)]
    }

    #[test]
    fn the_manifest_is_the_same_in_whatever_order_records_are_found() {
        let Assembled { manifest, index } = assemble("k", &layout(), records()).unwrap();
        assert_eq!((manifest.shares, manifest.pieces.len(), manifest.nonce.as_str()), (2, 6, "k"));
        let reversed = assemble("k", &layout(), records().into_iter().rev().collect()).unwrap();
        assert_eq!(manifest.encode(), reversed.manifest.encode());
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["weight_map"]["b"], "model-2.safetensors");
        assert_eq!(index["metadata"]["total_size"], 32);
    }

    #[test]
    fn what_does_not_belong_together_makes_no_manifest() {
        let refused = |change: fn(&mut Vec<ShareRecord>), why: &str| {
            let mut records = records();
            change(&mut records);
            let error = assemble("k", &layout(), records).unwrap_err();
            assert!(error.contains(why), "{error}");
        };
        refused(|records| drop(records.pop()), "1 records of 2");
        refused(|records| records[1].share = 0, "2 records of 2");
        refused(|records| records[1].attempt = "other".into(), "another attempt");
        refused(|records| records[1].state_hash = 5, "another attempt");
        refused(|records| records[1].of = 3, "another attempt");
        refused(|records| records[1].pieces[1].holds = vec![[2, 4]], "not those of all");
        refused(|records| records[1].pieces[1].holds = vec![[1, 4], [8, 12]], "the same elements");
        refused(|records| drop(records[0].pieces.remove(0)), "config.json");
        refused(|records| records.clear(), "no records");
    }
}
