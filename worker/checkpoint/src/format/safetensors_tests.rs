//! Tests of [`super`].

use proptest::prelude::*;

use super::super::plan::{by_chunk, place, plan, wanted as wanted_of};
use super::*;

/// Two tensors of one array of 8, with a gap of two between them.
fn wanted() -> Vec<TensorMeta> {
    vec![
        TensorMeta { name: "b".into(), shape: vec![2], offset: 6 },
        TensorMeta { name: "a".into(), shape: vec![2, 2], offset: 0 },
    ]
}

fn file() -> Vec<u8> {
    let tensors = wanted().into_iter().map(|tensor| (tensor.name, tensor.shape));
    let mut file = header(tensors);
    (1..=6_u8).for_each(|n| file.extend(f32::from(n).to_le_bytes()));
    file
}

fn read(file: &[u8], wanted: Vec<TensorMeta>, chunk: usize) -> Result<Vec<f32>, HeaderError> {
    let layout = Layout::new(wanted, 8).unwrap();
    let mut reader = HeaderReader::new(file.len() as u64);
    for chunk in file.chunks(chunk) {
        let Some((metadata, start)) = reader.push(chunk)? else { continue };
        let found = metadata.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect();
        if let Some(difference) = difference(&found, &layout) {
            return Err(HeaderError::Differs(difference));
        }
        let extents = extents(&metadata, start, (0, Kind::Weights), &layout)?;
        let copies = plan(extents, &wanted_of(&layout, 0, &[0..8])).map_err(HeaderError::Malformed)?;
        let mut arrays = vec![vec![0.0; 8]];
        for fill in by_chunk(&copies, |_| 1 << 20).values().flatten() {
            let to = &mut arrays[fill.array][fill.to.clone()];
            place(file, &fill.from, to).map_err(HeaderError::Malformed)?;
        }
        return Ok(arrays.remove(0));
    }
    Err(HeaderError::Malformed("ends too early".into()))
}

fn with_header(json: &str, data: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), data].concat()
}

#[test]
fn bytes_are_pinned() {
    let json = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]}}"#;
    let padded = format!("{json:<width$}", width = json.len().next_multiple_of(8));
    let floats: Vec<u8> = [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(file(), with_header(&padded, &floats));
}

#[test]
fn the_safetensors_crate_reads_what_is_written() {
    let file = file();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(tensors.tensor("a").unwrap().shape(), [2, 2]);
    assert_eq!(tensors.tensor("b").unwrap().data(), &file[file.len() - 24..][..8]);
}

#[test]
fn elements_arrive_where_they_belong_however_the_header_is_cut() {
    for chunk in 1..file().len() {
        assert_eq!(
            read(&file(), wanted(), chunk).unwrap(),
            [3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 1.0, 2.0],
            "{chunk}"
        );
    }
}

#[test]
fn the_first_difference_is_named() {
    let mut missing = wanted();
    missing[1].name = "c".into();
    let mut reshaped = wanted();
    reshaped[1].shape = vec![4];
    let fewer = vec![wanted().remove(0)];
    for (wanted, difference) in [
        (missing, "it has no tensor c"),
        (reshaped, "its a has shape [2, 2], wanted is [4]"),
        (fewer, "it has a tensor a, which is not wanted"),
    ] {
        assert_eq!(read(&file(), wanted, 1000), Err(HeaderError::Differs(difference.into())));
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let f32s = |offsets: &str, shape: &str| {
        let json = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
        with_header(&json, &[0; 16])
    };
    let lies = [
        ("longer than the file", [&u64::MAX.to_le_bytes()[..], &[0; 16]].concat()),
        ("not JSON", with_header("{]", &[])),
        ("beyond the end", f32s("[0,32]", "[8]")),
        ("short of the end", f32s("[0,8]", "[2]")),
        ("a gap at the start", f32s("[8,16]", "[2]")),
        ("backwards", f32s("[16,0]", "[4]")),
        ("a shape of another size", f32s("[0,16]", "[5]")),
        ("a shape that overflows", f32s("[0,16]", "[18446744073709551615,18446744073709551615]")),
        ("another type", {
            with_header(r#"{"a":{"dtype":"I32","shape":[4],"data_offsets":[0,16]}}"#, &[0; 16])
        }),
        ("an overlap", {
            let a = r#""a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#;
            let b = r#""b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}"#;
            with_header(&format!("{{{a},{b}}}"), &[0; 16])
        }),
    ];
    for (lie, file) in lies {
        let result = read(&file, wanted(), 7);
        assert!(matches!(result, Err(HeaderError::Malformed(_))), "{lie}: {result:?}");
    }
}

#[test]
fn a_file_that_ends_early_is_refused() {
    let file = file();
    for length in 0..file.len() {
        assert!(read(&file[..length], wanted(), 16).is_err(), "{length} bytes");
    }
}

proptest! {
    #[test]
    fn reading_never_panics(file in proptest::collection::vec(any::<u8>(), 0..300), chunk in 1..50_usize) {
        let _ = read(&file, wanted(), chunk);
    }

    #[test]
    fn reading_a_damaged_header_never_panics(at in 0..160_usize, byte: u8, chunk in 1..50_usize) {
        let mut file = file();
        file[at] = byte;
        let _ = read(&file, wanted(), chunk);
    }
}
