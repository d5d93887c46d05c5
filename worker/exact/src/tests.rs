//! Any split of micro-batches over accumulators gives the same bits as one wide sum.

use proptest::prelude::*;

use crate::*;

/// What all ranks hold after both exchanges.
#[derive(Debug, PartialEq)]
struct Outcome {
    gradient: Vec<f32>,
    next: Exponents,
    nonfinite: bool,
}

fn bits_of(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Of a micro-batch.
fn dither(index: usize) -> Dither {
    Dither::new(index as u64, 17)
}

/// [`exact_in`] 32 bits.
fn exact(gradients: &[Vec<f32>], owners: &[usize], order: &[usize], exponents: &Exponents) -> Outcome {
    exact_in(Bits::B32, gradients, owners, order, exponents)
}

/// The whole protocol of packed sums, with the ranks' contributions added in the order given.
fn exact_in(
    bits: Bits,
    gradients: &[Vec<f32>],
    owners: &[usize],
    order: &[usize],
    exponents: &Exponents,
) -> Outcome {
    let (length, micro_batches) = (gradients[0].len(), gradients.len() as u32);
    let rounding = Rounding::new(micro_batches, bits);
    let ranks: Vec<(Accumulator, Vec<i32>)> = order
        .iter()
        .map(|&rank| {
            let (mut accumulator, mut words) = (Accumulator::new(length / BLOCK, rounding), vec![0; length]);
            for ((index, gradient), _) in
                gradients.iter().enumerate().zip(owners).filter(|&(_, &owner)| owner == rank)
            {
                accumulator.add(&mut words, gradient, exponents.eighths(), &dither(index));
            }
            (accumulator, words)
        })
        .collect();
    let mut packed = vec![0; packed_bytes(length, bits)];
    let mut summed = vec![0u32; length / BLOCK];
    for (accumulator, own) in &ranks {
        // What a ring does, element by element: the sum so far is unpacked nowhere, but adding its low bits is the same.
        let mut words = vec![0i32; length];
        unpack(&packed, bits, &mut words);
        words.iter_mut().zip(own).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
        pack(&words, bits, &mut packed);
        let bounds = accumulator.bounds().iter().map(|&bound| u32::try_from(bound).unwrap_or(u32::MAX));
        summed.iter_mut().zip(bounds).for_each(|(sum, bound)| *sum = sum.saturating_add(bound));
    }
    let wide = wide_blocks(&summed, &rounding);
    let mut total = vec![0i64; wide.len() * (BLOCK + 1)];
    for (accumulator, own) in &ranks {
        let mut payload = WideBlocks::default();
        wide.iter()
            .for_each(|&block| payload.push(&accumulator.wide_sums(block, own), accumulator.bounds()[block]));
        total.iter_mut().zip(payload.into_words()).for_each(|(sum, word)| *sum = sum.wrapping_add(word));
    }
    let mut gradient = vec![0.0; length];
    decode(&packed, exponents.eighths(), &rounding, &mut gradient);
    let mut bounds: Vec<u64> = summed.iter().map(|&bound| u64::from(bound)).collect();
    for (&block, (sums, bound)) in wide.iter().zip(WideBlocks::split(&total)) {
        let range = block * BLOCK..(block + 1) * BLOCK;
        decode_wide(sums, &exponents.eighths()[block..=block], &rounding, &mut gradient[range]);
        bounds[block] = bound;
    }
    let nonfinite = ranks.iter().any(|(accumulator, _)| accumulator.nonfinite());
    Outcome { gradient, next: exponents.next(&bounds), nonfinite }
}

/// [`reference_in`] 32 bits.
fn reference(gradients: &[Vec<f32>], exponents: &Exponents) -> Outcome {
    reference_in(Bits::B32, gradients, exponents)
}

/// The reference: one 64-bit sum.
fn reference_in(bits: Bits, gradients: &[Vec<f32>], exponents: &Exponents) -> Outcome {
    let (length, micro_batches) = (gradients[0].len(), gradients.len() as u32);
    let rounding = Rounding::new(micro_batches, bits);
    let (mut sum, mut words) = (WideAccumulator::new(length / BLOCK, rounding), vec![0i64; length]);
    for (index, gradient) in gradients.iter().enumerate() {
        sum.add(&mut words, gradient, exponents.eighths(), &dither(index));
    }
    let mut gradient = vec![0.0; length];
    decode_wide(&words, exponents.eighths(), &rounding, &mut gradient);
    Outcome { gradient, next: exponents.next(sum.bounds()), nonfinite: sum.nonfinite() }
}

/// A gradient element of any kind that training meets, or should not meet.
fn element() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -1.0f32..1.0,
        2 => (-1.0f32..1.0, -60i32..40).prop_map(|(value, power)| value * 2f32.powi(power)),
        1 => Just(0.0f32),
        1 => any::<f32>(),
    ]
}

fn gradients() -> impl Strategy<Value = Vec<Vec<f32>>> {
    let block = prop_oneof![
        3 => proptest::collection::vec(-1.0f32..1.0, BLOCK),
        1 => proptest::collection::vec(element(), BLOCK),
        1 => Just(vec![0.0f32; BLOCK]),
    ];
    let gradient = proptest::collection::vec(block, 3).prop_map(|blocks| blocks.concat());
    proptest::collection::vec(gradient, 1..=9)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_split_gives_the_bits_of_the_wide_sum(
        gradients in gradients(),
        owners in proptest::collection::vec(0usize..9, 9),
        order in Just((0..9).collect::<Vec<usize>>()).prop_shuffle(),
        first_scale in -40i32..40,
        bits in proptest::sample::select(Bits::ALL.to_vec()),
    ) {
        let scale = 2f32.powi(first_scale);
        let maxima: Vec<f32> = block_maxima(&gradients[0]).iter().map(|maximum| (maximum * scale).min(f32::MAX)).collect();
        let exponents = Exponents::from_maxima(&maxima, gradients.len() as u32);
        let expected = reference_in(bits, &gradients, &exponents);
        let got = exact_in(bits, &gradients, &owners, &order, &exponents);
        prop_assert_eq!(bits_of(&got.gradient), bits_of(&expected.gradient));
        prop_assert_eq!((&got.next, got.nonfinite), (&expected.next, expected.nonfinite));
        prop_assert_eq!(got.next, reference(&gradients, &exponents).next, "exponents do not depend on the bits");
    }

    #[test]
    fn the_mean_is_as_good_as_floats(gradients in proptest::collection::vec(proptest::collection::vec(-1.0f32..1.0, BLOCK), 1..=9)) {
        let exponents = Exponents::from_maxima(&block_maxima(&gradients[0]), gradients.len() as u32);
        let got = reference(&gradients, &exponents).gradient;
        let count = gradients.len() as f64;
        let (mut error, mut size) = (0.0, 0.0);
        for (index, value) in got.iter().enumerate() {
            let mean = gradients.iter().map(|gradient| f64::from(gradient[index])).sum::<f64>() / count;
            error += (f64::from(*value) - mean).powi(2);
            size += mean.powi(2);
        }
        prop_assert!(error.sqrt() <= 1e-6 * size.sqrt() + 1e-12, "relative error {}", (error / size).sqrt());
    }
}

#[test]
fn a_sudden_jump_makes_blocks_wide_and_loses_nothing() {
    let calm = vec![1e-3f32; BLOCK];
    let exponents = Exponents::from_maxima(&block_maxima(&calm), 2);
    let jump: Vec<f32> = calm.iter().map(|value| value * 2f32.powi(20)).collect();
    let gradients = vec![calm, jump.clone()];
    let got = exact(&gradients, &[0, 1], &[1, 0], &exponents);
    assert_eq!(got, reference(&gradients, &exponents));
    assert_eq!(got.gradient[0], ((f64::from(jump[0]) + f64::from(1e-3f32)) / 2.0) as f32);
    assert!(got.next.eighths()[0] > exponents.eighths()[0] + 8 * 16);
}

#[test]
fn a_sum_that_rounding_up_takes_over_the_edge_is_wide() {
    // The scale is 1; each micro-batch is worth almost 16 in 8 bits, so that eight are almost 128, and are rounded to it.
    let exponents = Exponents::from_eighths(vec![29 * 8]);
    let gradients = vec![vec![(1 << 27) as f32 - 8.0; BLOCK]; 8];
    let got = exact_in(Bits::B8, &gradients, &[0, 1, 2, 0, 1, 2, 0, 1], &[0, 1, 2], &exponents);
    assert_eq!(got, reference_in(Bits::B8, &gradients, &exponents));
    assert_eq!(got.gradient[0], (1 << 27) as f32, "16 steps of 2^23");
}

#[test]
fn floats_depend_on_order_where_integers_do_not() {
    // What all this is for: the same three numbers, added in two orders.
    let numbers = [1.0f32, 1e-8, -1.0];
    assert_ne!(numbers[0] + numbers[1] + numbers[2], numbers[0] + numbers[2] + numbers[1]);
    let gradients: Vec<Vec<f32>> = numbers.iter().map(|&number| vec![number; BLOCK]).collect();
    let exponents = Exponents::from_maxima(&block_maxima(&gradients[0]), 3);
    let one = exact(&gradients, &[0, 1, 2], &[0, 1, 2], &exponents);
    assert_eq!(one, exact(&gradients, &[0, 1, 2], &[2, 0, 1], &exponents));
}

#[test]
fn infinities_and_nan_raise_the_flag_and_count_as_zero() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut gradient = vec![0.5f32; BLOCK];
        gradient[7] = bad;
        let exponents = Exponents::from_maxima(&[0.5], 1);
        let got = exact(&[gradient], &[0], &[0], &exponents);
        assert!(got.nonfinite);
        assert_eq!((got.gradient[7], got.gradient[8]), (0.0, 0.5));
    }
}

#[test]
fn saturation_is_counted_and_the_same_for_everybody() {
    let (mut accumulator, mut words) = (Accumulator::new(1, Rounding::new(8, Bits::B32)), vec![0; BLOCK]);
    let exponents = Exponents::from_maxima(&[1e-20], 8);
    accumulator.add(&mut words, &vec![1e20; BLOCK], exponents.eighths(), &Dither::default());
    assert_eq!(accumulator.saturated(), BLOCK as u64);
    assert_eq!(accumulator.bounds(), [1 << 59]);
}

/// Errors of the mean in units of what one integer of the sum is worth in it: their mean and their root mean square.
fn errors(bits: Bits, micro_batches: usize, rounds: u64) -> (f64, f64) {
    let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
    for round in 0..rounds {
        let value = |index: u64| {
            let noise = (index ^ round << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            noise as f32 / (1 << 23) as f32 - 0.98
        };
        let gradients: Vec<Vec<f32>> = (0..micro_batches as u64)
            .map(|m| (0..BLOCK as u64).map(|index| value(m * 1000 + index)).collect())
            .collect();
        let exponents = Exponents::from_maxima(&[1.0], micro_batches as u32);
        let rounding = Rounding::new(micro_batches as u32, bits);
        let (mut accumulator, mut words) = (Accumulator::new(1, rounding), vec![0; BLOCK]);
        for (index, gradient) in gradients.iter().enumerate() {
            let dither = Dither::new(round * 100 + index as u64, 0);
            accumulator.add(&mut words, gradient, exponents.eighths(), &dither);
        }
        let unit = 2f64.powi(-rounding.shift_of_sums(exponents.eighths()[0]));
        for (index, word) in words.iter().enumerate() {
            let exact: f64 = gradients.iter().map(|gradient| f64::from(gradient[index])).sum();
            let error = f64::from(*word) - exact / unit;
            assert!(error.abs() <= micro_batches as f64, "each micro-batch is off by less than one");
            (sum, squares, count) = (sum + error, squares + error * error, count + 1.0);
        }
    }
    (sum / count, f64::sqrt(squares / count))
}

#[test]
fn shorter_sums_are_right_on_average() {
    for bits in [Bits::B8, Bits::B12, Bits::B16, Bits::B24] {
        let (mean, size) = errors(bits, 8, 400);
        // A rounding up or down with even odds is off by 1/2, one whose odds are uniform by 1/sqrt(6).
        let expected = f64::sqrt(8.0 / 6.0);
        println!("{bits:?}: errors of {size:.3} integers, {expected:.3} expected, their mean {mean:.4}");
        let four_deviations = 4.0 * expected / f64::sqrt(400.0 * BLOCK as f64);
        assert!(mean.abs() < four_deviations, "{bits:?}: a mean error of {mean}");
        assert!((size / expected - 1.0).abs() < 0.05, "{bits:?}: errors of {size}");
    }
}
