//! Tests of [`super`]: whatever the division that saved and the one that needs, every element comes once.

use proptest::prelude::*;

use super::*;
use crate::layout::TensorMeta;

/// Tensors of these sizes with gaps after some.
fn layout(sizes: &[usize]) -> Layout {
    let mut offset = 0;
    let mut tensors = Vec::new();
    for (n, &size) in sizes.iter().enumerate() {
        tensors.push(TensorMeta { name: format!("t{n}"), shape: vec![size], offset });
        offset += size + (n % 3) * 2;
    }
    Layout::new(tensors, offset).unwrap()
}

/// The elements between sorted cuts.
fn divided(elements: usize, cuts: &[usize]) -> Vec<Range<usize>> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (elements + 1)).chain([0, elements]).collect();
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// Pieces whose elements are their own index, written part by part after a header of 8 bytes.
fn save(layout: &Layout, parts: &[Range<usize>]) -> (Vec<Vec<u8>>, Vec<Extent>) {
    let mut extents = Vec::new();
    let mut pieces = Vec::new();
    for (piece, part) in parts.iter().enumerate() {
        let mut bytes = vec![0xff; 8];
        for tensor in layout.tensors() {
            let Some(elements) = common(&tensor.span(), part) else { continue };
            extents.push(Extent { piece, at: bytes.len() as u64, array: 0, elements: elements.clone() });
            elements.for_each(|element| bytes.extend((element as f32).to_le_bytes()));
        }
        pieces.push(bytes);
    }
    (pieces, extents)
}

proptest! {
    #[test]
    fn any_division_is_read_as_any_other(
        sizes in proptest::collection::vec(0..30_usize, 1..8),
        saved_cuts in proptest::collection::vec(any::<usize>(), 0..5),
        needed_cuts in proptest::collection::vec(any::<usize>(), 0..5),
        chunk in 1..20_u64,
    ) {
        let layout = layout(&sizes);
        let (pieces, extents) = save(&layout, &divided(layout.elements(), &saved_cuts));
        let in_tensor = |at: usize| layout.tensors().iter().any(|tensor| tensor.span().contains(&at));
        for needed in divided(layout.elements(), &needed_cuts) {
            let wanted = wanted(&layout, 0, std::slice::from_ref(&needed));
            let copies = plan(extents.clone(), &wanted).unwrap();
            let reads = by_chunk(&copies, |_| chunk * 4);
            let mut arrays = [vec![0.0; needed.len()]];
            let mut filled = 0;
            for (&(piece, number), fills) in &reads {
                let start = (number * chunk * 4) as usize;
                let bytes = &pieces[piece][start..pieces[piece].len().min(start + chunk as usize * 4)];
                prop_assert!(!fills.is_empty());
                for fill in fills {
                    place(bytes, &fill.from, &mut arrays[fill.array][fill.to.clone()]).unwrap();
                    filled += fill.to.len();
                }
            }
            let want: Vec<f32> = needed.clone().map(|at| if in_tensor(at) { at as f32 } else { 0.0 }).collect();
            prop_assert_eq!(&arrays[0], &want);
            prop_assert_eq!(filled, needed.filter(|&at| in_tensor(at)).count(), "each once");
        }
    }

    #[test]
    fn what_is_not_there_is_named(
        sizes in proptest::collection::vec(1..30_usize, 2..8),
        drop in any::<prop::sample::Index>(),
    ) {
        let layout = layout(&sizes);
        let (_, mut extents) = save(&layout, &divided(layout.elements(), &[layout.elements() / 2]));
        let gone = extents.remove(drop.index(extents.len()));
        let all = wanted(&layout, 0, std::slice::from_ref(&(0..layout.elements())));
        let error = plan(extents.clone(), &all).unwrap_err();
        prop_assert!(error.contains("missing") && error.contains(&gone.elements.start.to_string()), "{}", error);
        let rest: Vec<Range<usize>> = vec![0..gone.elements.start, gone.elements.end..layout.elements()];
        prop_assert!(plan(extents, &wanted(&layout, 0, &rest)).is_ok());
    }
}

#[test]
fn elements_that_are_there_twice_are_refused() {
    let extent = |elements| Extent { piece: 0, at: 8, array: 0, elements };
    let error = plan(vec![extent(0..4), extent(3..6)], &[]).unwrap_err();
    assert!(error.contains("3..6") && error.contains("twice"), "{error}");
}

#[test]
fn ranges_follow_each_other_in_what_is_handed_over() {
    let layout = layout(&[4, 4]);
    let ranges = [1..3, 4..6];
    let to: Vec<(Range<usize>, usize)> =
        wanted(&layout, 0, &ranges).into_iter().map(|wanted| (wanted.elements, wanted.to)).collect();
    assert_eq!(to, [(1..3, 0), (4..6, 2)]);
}

#[test]
fn a_chunk_that_is_too_short_is_an_error() {
    let chunk = |bytes: usize| vec![0; bytes];
    assert!(place(&chunk(7), &(0..8), &mut [0.0; 2]).is_err());
    assert!(place(&chunk(8), &(0..8), &mut [0.0; 1]).is_err());
    assert!(place(&chunk(8), &(4..12), &mut [0.0; 2]).is_err());
    assert!(place(&[], &(0..4), &mut [0.0; 1]).is_err());
    assert!(place(&chunk(8), &(0..8), &mut [0.0; 2]).is_ok());
}
