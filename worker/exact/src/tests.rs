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

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The whole protocol of 32-bit sums, with the ranks' contributions added in the order given.
fn exact(gradients: &[Vec<f32>], owners: &[usize], order: &[usize], exponents: &Exponents) -> Outcome {
    let (length, micro_batches) = (gradients[0].len(), gradients.len() as u32);
    let rounding = Rounding::new(micro_batches);
    let ranks: Vec<(Accumulator, Vec<i32>)> = order
        .iter()
        .map(|&rank| {
            let (mut accumulator, mut words) = (Accumulator::new(length / BLOCK, rounding), vec![0; length]);
            let own = gradients.iter().zip(owners).filter(|&(_, &owner)| owner == rank);
            own.for_each(|(gradient, _)| accumulator.add(&mut words, gradient, exponents.eighths()));
            (accumulator, words)
        })
        .collect();
    let mut words = vec![0i32; length];
    let mut summed = vec![0u32; length / BLOCK];
    for (accumulator, own) in &ranks {
        words.iter_mut().zip(own).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
        let bounds = accumulator.bounds().iter().map(|&bound| u32::try_from(bound).unwrap_or(u32::MAX));
        summed.iter_mut().zip(bounds).for_each(|(sum, bound)| *sum = sum.saturating_add(bound));
    }
    let wide = wide_blocks(&summed);
    let mut total = vec![0i64; wide.len() * (BLOCK + 1)];
    for (accumulator, own) in &ranks {
        let mut payload = WideBlocks::default();
        wide.iter()
            .for_each(|&block| payload.push(&accumulator.wide_sums(block, own), accumulator.bounds()[block]));
        total.iter_mut().zip(payload.into_words()).for_each(|(sum, word)| *sum = sum.wrapping_add(word));
    }
    let mut gradient = vec![0.0; length];
    decode(&words, exponents.eighths(), micro_batches, &mut gradient);
    let mut bounds: Vec<u64> = summed.iter().map(|&bound| u64::from(bound)).collect();
    for (&block, (sums, bound)) in wide.iter().zip(WideBlocks::split(&total)) {
        let range = block * BLOCK..(block + 1) * BLOCK;
        decode_wide(sums, &exponents.eighths()[block..=block], micro_batches, &mut gradient[range]);
        bounds[block] = bound;
    }
    let nonfinite = ranks.iter().any(|(accumulator, _)| accumulator.nonfinite());
    Outcome { gradient, next: exponents.next(&bounds), nonfinite }
}

/// The reference: one 64-bit sum.
fn reference(gradients: &[Vec<f32>], exponents: &Exponents) -> Outcome {
    let (length, micro_batches) = (gradients[0].len(), gradients.len() as u32);
    let (mut sum, mut words) =
        (WideAccumulator::new(length / BLOCK, Rounding::new(micro_batches)), vec![0i64; length]);
    gradients.iter().for_each(|gradient| sum.add(&mut words, gradient, exponents.eighths()));
    let mut gradient = vec![0.0; length];
    decode_wide(&words, exponents.eighths(), micro_batches, &mut gradient);
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
    ) {
        let scale = 2f32.powi(first_scale);
        let maxima: Vec<f32> = block_maxima(&gradients[0]).iter().map(|maximum| (maximum * scale).min(f32::MAX)).collect();
        let exponents = Exponents::from_maxima(&maxima, gradients.len() as u32);
        let expected = reference(&gradients, &exponents);
        let got = exact(&gradients, &owners, &order, &exponents);
        prop_assert_eq!(bits(&got.gradient), bits(&expected.gradient));
        prop_assert_eq!((got.next, got.nonfinite), (expected.next, expected.nonfinite));
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
    let (mut accumulator, mut words) = (Accumulator::new(1, Rounding::new(8)), vec![0; BLOCK]);
    let exponents = Exponents::from_maxima(&[1e-20], 8);
    accumulator.add(&mut words, &vec![1e20; BLOCK], exponents.eighths());
    assert_eq!(accumulator.saturated(), BLOCK as u64);
    assert_eq!(accumulator.bounds(), [1 << 59]);
}
