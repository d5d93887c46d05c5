//! Tests of [`super`].

use safetensors::tensor::{TensorView, serialize};

use super::*;
use crate::layout::TensorMeta;

fn layout() -> Layout {
    let tensor =
        |name: &str, shape: &[usize], offset| TensorMeta { name: name.into(), shape: shape.into(), offset };
    Layout::new(vec![tensor("a", &[2, 3], 0), tensor("b", &[2], 8)], 10).unwrap()
}

/// Names may have a prefix; a buffer is passed over.
fn meaning(name: &str) -> Option<String> {
    (name != "buffer").then(|| name.trim_start_matches("model.").to_owned())
}

/// A tensor that counts up from `first`.
type Counted<'a> = (&'a str, Dtype, &'a [usize], u8);

fn file(tensors: &[Counted<'_>]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, dtype, shape, first)| {
            let numbers = (0..shape.iter().product::<usize>()).map(|n| f32::from(*first + n as u8) + 0.5);
            numbers
                .flat_map(|number| match dtype {
                    Dtype::U8 => vec![1],
                    Dtype::F16 => f16::from_f32(number).to_le_bytes().to_vec(),
                    Dtype::BF16 => bf16::from_f32(number).to_le_bytes().to_vec(),
                    _ => number.to_le_bytes().to_vec(),
                })
                .collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, dtype, shape, _), bytes)| {
        (name.to_string(), TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
    });
    serialize(views.collect::<Vec<_>>(), None).unwrap()
}

fn load(files: &[(&str, Vec<u8>)]) -> Result<Vec<f32>, String> {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let location = Location::parse(folder.path().to_str().unwrap()).unwrap();
    let foreign = Foreign::open(&location).map_err(|error| error.to_string())?;
    let (flat, hash) = foreign.load(&layout(), meaning).map_err(|error| error.to_string())?;
    let bytes = files.iter().filter(|(name, _)| name.ends_with(".safetensors")).flat_map(|(_, bytes)| bytes);
    let plain = blake3::hash(&bytes.copied().collect::<Vec<u8>>()).to_hex().to_string();
    assert_eq!((&hash, &foreign.hash().unwrap()), (&plain, &plain));
    Ok(flat)
}

const A: Counted<'static> = ("a", Dtype::F32, &[2, 3], 1);
const B: Counted<'static> = ("model.b", Dtype::F32, &[2], 20);
const FLAT: [f32; 10] = [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 0.0, 0.0, 20.5, 21.5];

#[test]
fn one_file_or_several_of_any_float_type_give_the_same_elements() {
    let buffer = ("buffer", Dtype::U8, &[3][..], 0);
    assert_eq!(load(&[(MODEL, file(&[B, buffer, A]))]).unwrap(), FLAT);
    for dtype in [Dtype::F16, Dtype::BF16] {
        assert_eq!(load(&[(MODEL, file(&[("a", dtype, &[2, 3], 1), B]))]).unwrap(), FLAT);
    }
    let index =
        br#"{"metadata":{"total_size":32},"weight_map":{"a":"1.safetensors","model.b":"2.safetensors"}}"#;
    let files = [(INDEX, index.to_vec()), ("1.safetensors", file(&[A])), ("2.safetensors", file(&[B]))];
    assert_eq!(load(&files).unwrap(), FLAT);
}

#[test]
fn elements_arrive_however_the_file_is_cut() {
    let file = file(&[("a", Dtype::BF16, &[2, 3], 1), B]);
    let start = 8 + u64::from_le_bytes(*file.first_chunk().unwrap());
    let b = Run { bytes: start..start + 8, dtype: Dtype::F32, to: 8 };
    let a = Run { bytes: start + 8..start + 20, dtype: Dtype::BF16, to: 0 };
    let runs = [b, a].map(|run| (run.bytes, run.dtype, run.to));
    for length in 1..file.len() {
        let runs = runs.iter().map(|(bytes, dtype, to)| Run { bytes: bytes.clone(), dtype: *dtype, to: *to });
        let mut filling = Filling { runs: runs.collect(), at: 0, held: Vec::new() };
        let mut flat = [0.0; 10];
        file.chunks(length).for_each(|chunk| filling.take(chunk, &mut flat));
        assert_eq!((flat, filling.at), (FLAT, file.len() as u64), "in chunks of {length}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let good = file(&[A, B]);
    let mut lying = good.clone();
    lying[..8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    let index = |map: &str| (INDEX, format!(r#"{{"weight_map":{map}}}"#).into_bytes());
    let one = |tensors: &[Counted<'_>]| vec![(MODEL, file(tensors))];
    for (files, said) in [
        (vec![], "it has neither model.safetensors nor model.safetensors.index.json"),
        (vec![(MODEL, lying)], "model.safetensors: announces a header of 1099511627776 bytes where"),
        (
            vec![(MODEL, good[..good.len() - 3].to_vec())],
            "describes 32 bytes of tensors and is followed by 29",
        ),
        (vec![(MODEL, good[..30].to_vec())], "model.safetensors: announces a header of"),
        (vec![(MODEL, good[..5].to_vec())], "model.safetensors: it ends within its header"),
        (vec![(MODEL, Vec::new())], "model.safetensors: it ends within its header"),
        (one(&[A]), "its weights have no tensor b"),
        (one(&[("a", Dtype::F32, &[3, 2], 0), B]), "its a has shape [3, 2], the model's has [2, 3]"),
        (one(&[A, B, ("c", Dtype::F32, &[1], 0)]), "it has a tensor c, which the model has not"),
        (one(&[A, B, ("b", Dtype::F32, &[2], 0)]), "are the same tensor of the model"),
        (one(&[A, ("b", Dtype::I32, &[2], 0)]), "its b is I32: only F32, F16 and BF16 are read"),
        (vec![index(r#"{"a":"1.safetensors"}"#)], "index.json: it names 1.safetensors, which is not there"),
        (vec![index(r#"{"a":"../1.safetensors"}"#)], "which is no safetensors file beside it"),
        (vec![index(r#"{"a":7}"#)], "model.safetensors.index.json: invalid type"),
        (
            vec![index(r#"{"a":"1.safetensors","b":"1.safetensors"}"#), ("1.safetensors", file(&[A]))],
            "1.safetensors: it has no tensor b, which model.safetensors.index.json says is in it",
        ),
        (
            vec![index(r#"{"a":"1.safetensors"}"#), ("1.safetensors", good)],
            "1.safetensors: it has a tensor model.b, which model.safetensors.index.json has not here",
        ),
    ] {
        let error = load(&files).unwrap_err();
        assert!(error.contains(said), "{error}\nwhere expected was: {said}");
    }
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let location = Location::parse("/nowhere/gpt2").unwrap();
    let error = Foreign::open(&location).map(drop).unwrap_err().to_string();
    assert!(error.contains("/nowhere/gpt2") && error.contains("check the path"), "{error}");
}
