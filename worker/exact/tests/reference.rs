//! The sums against integers of 128 bits, and what is part of a result pinned to its bits.
//!
//! The reference takes an element apart into mantissa and power, and shifts and rounds in integers: it shares no
//! arithmetic with the code under test, which multiplies floats.

use mattock_exact::{
    Accumulator, AdamW, AdamWStep, BLOCK, Bits, Dither, Exponents, Rounding, WideAccumulator, WideBlocks,
    adamw, block_maxima, chunk_squares, decode, decode_wide, exponent_hash, pack, packed_bytes, state_hash,
    wide_blocks,
};
use proptest::prelude::*;

/// Bits of head-room, as the design fixes them.
const HEADROOM: i32 = 2;

/// With 32 bits nothing is random.
const PLAIN: Dither = Dither::new(0, 0);

/// 32-bit sums over so many micro-batches.
fn of(micro_batches: usize) -> Rounding {
    Rounding::new(micro_batches as u32, Bits::B32)
}

/// `round_ties_even(value * 2^(31 - 2 - ceil(e)))`, with nothing clipped; far too large ones are just very large.
fn rounded(value: f32, eighths: i16) -> i128 {
    if !value.is_finite() {
        return 0;
    }
    let bits = value.abs().to_bits();
    let (mantissa, power) = match bits >> 23 {
        0 => (bits, -149),
        exponent => (bits & 0x7f_ffff | 0x80_0000, exponent as i32 - 150),
    };
    let ceiling = (f64::from(eighths) / 8.0).ceil() as i32;
    let left = power + 31 - HEADROOM - ceiling;
    let mantissa = i128::from(mantissa);
    let magnitude = if left >= 0 {
        mantissa << left.min(90)
    } else {
        let right = (-left).min(90);
        let (whole, rest, half) = (mantissa >> right, mantissa & ((1 << right) - 1), 1i128 << (right - 1));
        whole + i128::from(rest > half || rest == half && whole & 1 == 1)
    };
    if value < 0.0 { -magnitude } else { magnitude }
}

/// What all micro-batches of one block add up to.
#[derive(Debug, PartialEq)]
struct Sums {
    sums: Vec<i128>,
    bound: u64,
    saturated: u64,
    nonfinite: bool,
}

fn reference(gradients: &[Vec<f32>], eighths: i16) -> Sums {
    let limit = 1i128 << (62 - (gradients.len() as f64).log2().ceil() as u32);
    let mut sums = Sums { sums: vec![0; BLOCK], bound: 0, saturated: 0, nonfinite: false };
    for gradient in gradients {
        let mut largest = 0;
        for (sum, &value) in sums.sums.iter_mut().zip(gradient) {
            let q = rounded(value, eighths);
            sums.nonfinite |= !value.is_finite();
            sums.saturated += u64::from(q.abs() > limit);
            let q = q.clamp(-limit, limit);
            *sum += q;
            largest = largest.max(q.unsigned_abs() as u64);
        }
        sums.bound += largest;
    }
    sums
}

fn narrow(gradients: &[Vec<f32>], eighths: i16) -> (Sums, Vec<i32>) {
    let rounding = of(gradients.len());
    let (mut accumulator, mut words) = (Accumulator::new(1, rounding), vec![0i32; BLOCK]);
    gradients.iter().for_each(|gradient| accumulator.add(&mut words, gradient, &[eighths], &PLAIN));
    let sums = Sums {
        sums: accumulator.wide_sums(0, &words).map(i128::from).to_vec(),
        bound: accumulator.bounds()[0],
        saturated: accumulator.saturated(),
        nonfinite: accumulator.nonfinite(),
    };
    (sums, words)
}

fn wide(gradients: &[Vec<f32>], eighths: i16) -> Sums {
    let rounding = of(gradients.len());
    let (mut accumulator, mut words) = (WideAccumulator::new(1, rounding), vec![0i64; BLOCK]);
    gradients.iter().for_each(|gradient| accumulator.add(&mut words, gradient, &[eighths], &PLAIN));
    Sums {
        sums: words.into_iter().map(i128::from).collect(),
        bound: accumulator.bounds()[0],
        saturated: accumulator.saturated(),
        nonfinite: accumulator.nonfinite(),
    }
}

/// Elements around the size that the exponent stands for, far from it, and of every kind of bits.
fn gradient(eighths: i16) -> impl Strategy<Value = Vec<f32>> {
    let unit = 2f64.powf(f64::from(eighths) / 8.0).clamp(1e-38, 1e37) as f32;
    let element = prop_oneof![
        8 => (-1.0f32..1.0).prop_map(move |value| value * unit),
        2 => (-1.0f32..1.0, -30i32..40).prop_map(move |(value, power)| value * unit * 2f32.powi(power)),
        1 => any::<f32>(),
        // Halves of the last place: ties.
        2 => (-4000i32..4000).prop_map(move |halves| halves as f32 * unit * 2f32.powi(-30)),
    ];
    prop_oneof![
        2 => proptest::collection::vec((-1.0f32..1.0).prop_map(move |value| value * unit), BLOCK),
        1 => proptest::collection::vec(element, BLOCK),
    ]
}

fn case() -> impl Strategy<Value = (i16, Vec<Vec<f32>>)> {
    prop_oneof![3 => -80i16..80, 1 => -776i16..1017]
        .prop_flat_map(|eighths| (Just(eighths), proptest::collection::vec(gradient(eighths), 1..=9)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn sums_are_those_of_wide_integers((eighths, gradients) in case()) {
        let expected = reference(&gradients, eighths);
        prop_assert_eq!(&wide(&gradients, eighths), &expected);
        let (sums, words) = narrow(&gradients, eighths);
        prop_assert_eq!(&sums, &expected);
        for (word, sum) in words.iter().zip(&expected.sums) {
            prop_assert_eq!(*word, *sum as i32, "the words are the low halves");
        }
    }
}

#[test]
fn ties_go_to_the_even_integer() {
    // e = 29 octaves: the scale is 1.
    let eighths = 29 * 8;
    let mut gradient = vec![0.0; BLOCK];
    gradient[..8].copy_from_slice(&[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.500_000_06, 3.0]);
    let expected = [0, 2, 2, 0, -2, -2, 1, 3];
    let (sums, words) = narrow(std::slice::from_ref(&gradient), eighths);
    assert_eq!(words[..8], expected);
    assert_eq!(sums.bound, 3);
    assert_eq!(wide(&[gradient], eighths).sums[..8], expected.map(i128::from));
}

#[test]
fn a_block_is_promoted_exactly_where_its_bound_reaches_32_bits() {
    let eighths = 29 * 8;
    let block = |value: f32| vec![value; BLOCK];
    // 2^31 - 128 is the largest f32 below 2^31.
    for (first, second) in [(2_147_483_520.0, 127.0), (2_147_483_520.0, 128.0), (0.0, 2_147_483_648.0)] {
        let gradients = [block(first), block(second)];
        let expected = reference(&gradients, eighths);
        let (sums, words) = narrow(&gradients, eighths);
        assert_eq!(sums, expected, "{first} and {second}");
        assert_eq!(words[0], expected.sums[0] as i32);
        assert_eq!(expected.bound, first as u64 + second as u64, "{first} and {second}");
        let summed = [u32::try_from(sums.bound).unwrap()];
        assert_eq!(wide_blocks(&summed, &of(2)).is_empty(), sums.bound < 1 << 31, "{first} and {second}");
    }
}

#[test]
fn clipped_elements_are_counted_and_those_at_the_limit_are_not() {
    // Of one micro-batch the limit is 2^62, of three 2^60.
    for (micro_batches, limit) in [(0, 62), (1, 62), (2, 61), (3, 60), (4, 60), (5, 59)] {
        let eighths = 29 * 8;
        let mut gradient = vec![0.0; BLOCK];
        gradient[0] = 2f32.powi(limit);
        gradient[1] = -2f32.powi(limit + 1);
        let rounding = of(micro_batches);
        let (mut accumulator, mut words) = (WideAccumulator::new(1, rounding), vec![0; BLOCK]);
        accumulator.add(&mut words, &gradient, &[eighths], &PLAIN);
        assert_eq!((words[0], words[1]), (1 << limit, -(1 << limit)), "{micro_batches}");
        assert_eq!((accumulator.saturated(), accumulator.bounds()), (1, &[1 << limit][..]));
    }
}

#[test]
fn nothing_is_left_after_a_reset() {
    let eighths = 29 * 8;
    let mut bad = vec![1e15; BLOCK];
    (bad[3], bad[4]) = (f32::NAN, 1e30);
    let good = vec![7.0; BLOCK];
    let (mut narrow, mut low) = (Accumulator::new(1, of(2)), vec![0; BLOCK]);
    let (mut wide, mut high) = (WideAccumulator::new(1, of(2)), vec![0; BLOCK]);
    narrow.add(&mut low, &bad, &[eighths], &PLAIN);
    wide.add(&mut high, &bad, &[eighths], &PLAIN);
    assert!(narrow.nonfinite() && wide.nonfinite());
    assert_eq!((narrow.saturated(), wide.saturated()), (1, 1));
    (low, high) = (vec![0; BLOCK], vec![0; BLOCK]);
    narrow.reset();
    wide.reset();
    assert!(!narrow.nonfinite() && !wide.nonfinite());
    assert_eq!((narrow.saturated(), wide.saturated()), (0, 0));
    narrow.add(&mut low, &good, &[eighths], &PLAIN);
    wide.add(&mut high, &good, &[eighths], &PLAIN);
    assert_eq!((narrow.bounds(), wide.bounds()), (&[7][..], &[7][..]));
    assert_eq!(narrow.wide_sums(0, &low), [7; BLOCK]);
    assert_eq!(high, [7; BLOCK]);
}

#[test]
fn each_block_has_its_own_sums() {
    let eighths = [29 * 8, 29 * 8, 30 * 8];
    let gradient: Vec<f32> = [3.0, 4e9, 6.0].into_iter().flat_map(|value| [value; BLOCK]).collect();
    let (mut accumulator, mut words) = (Accumulator::new(3, of(1)), vec![0; 3 * BLOCK]);
    accumulator.add(&mut words, &gradient, &eighths, &PLAIN);
    assert_eq!(accumulator.bounds(), [3, 4_000_000_000, 3]);
    assert_eq!([0, 1, 2].map(|block| accumulator.wide_sums(block, &words)[255]), [3, 4_000_000_000, 3]);
    assert_eq!(wide_blocks(&[3, 4_000_000_000, 3, (1 << 31) - 1, 1 << 31], &of(1)), [1, 4]);
}

#[test]
fn wide_blocks_travel_as_they_are() {
    let sums: [i64; BLOCK] = std::array::from_fn(|index| (index as i64 - 128) << 40);
    let mut payload = WideBlocks::default();
    payload.push(&sums, u64::MAX);
    payload.push(&[5; BLOCK], 9);
    let words = payload.into_words();
    let blocks: Vec<(&[i64], u64)> = WideBlocks::split(&words).collect();
    assert_eq!(blocks, [(&sums[..], u64::MAX), (&[5; BLOCK][..], 9)]);
}

#[test]
fn the_mean_is_what_the_sum_is_worth() {
    let sums: Vec<i32> = (0..2 * BLOCK as i32).map(|index| index * 4_194_301 - 1_073_741_824).collect();
    let wide: Vec<i64> = sums.iter().map(|&sum| i64::from(sum)).collect();
    let eighths = [29 * 8 - 7, -33];
    let (mut narrow, mut full) = (vec![0.0; 2 * BLOCK], vec![0.0; 2 * BLOCK]);
    let mut packed = vec![0; packed_bytes(sums.len(), Bits::B32)];
    pack(&sums, Bits::B32, &mut packed);
    decode(&packed, &eighths, &of(6), &mut narrow);
    decode_wide(&wide, &eighths, &of(6), &mut full);
    assert_eq!(narrow, full);
    for (index, &value) in narrow.iter().enumerate() {
        // ceil(-33 / 8) = -4: an integer is worth 2^-33.
        let worth = if index < BLOCK { 1.0 } else { 2f64.powi(-33) };
        let exact = f64::from(sums[index]) * worth / 6.0;
        assert!((f64::from(value) - exact).abs() <= exact.abs() * 6e-8, "{index}: {value} against {exact}");
    }
    // More than 53 bits are rounded, not lost.
    let mut large = vec![0.0; BLOCK];
    decode_wide(&[i64::MAX / 2; BLOCK], &[29 * 8], &of(1), &mut large);
    assert_eq!(large, [2f32.powi(62); BLOCK]);
}

#[test]
fn exponents_are_kept_and_counted() {
    let exponents = Exponents::from_eighths(vec![-3, 4]);
    assert_eq!((exponents.eighths(), exponents.len(), exponents.is_empty()), (&[-3, 4][..], 2, false));
    assert!(Exponents::default().is_empty());
    assert_eq!(Exponents::default().len(), 0);
}

#[test]
fn first_exponents_come_from_the_maxima() {
    let gradient: Vec<f32> = [0.0, -0.75, f32::NAN].into_iter().flat_map(|value| [value; BLOCK]).collect();
    assert_eq!(block_maxima(&gradient), [0.0, 0.75, f32::MAX]);
    assert_eq!(block_maxima(&gradient[..BLOCK + 1]), [0.0, 0.75]);
    // log2(0.75 * 8) = 2.585, in eighths 20.7; zeros take the floor, sixteen octaves below the highest.
    assert_eq!(Exponents::from_maxima(&[0.75, 0.0], 8).eighths(), [21, 21 - 128]);
    assert_eq!(Exponents::from_maxima(&[f32::INFINITY, f32::MAX], 1).eighths(), [128 * 8, 128 * 8]);
    assert_eq!(
        Exponents::from_maxima(&[f32::MIN_POSITIVE, 0.5 * f32::MIN_POSITIVE], 1).eighths(),
        [-776, -776]
    );
    assert_eq!(Exponents::from_maxima(&[0.0, 0.0], 8).eighths(), [-776, -776], "nothing was measured");
}

#[test]
fn next_exponents_come_from_the_bounds() {
    let start = Exponents::from_eighths(vec![0, 5, 8, 16, 16]);
    // A bound of 2^29 stands for 2^ceil(e): here 2^0, 2^1, 2^1, 2^2, 2^2.
    let next = start.next(&[1 << 29, 1 << 29, 1 << 30, 0, (1 << 29) + 1]);
    assert_eq!(next.eighths(), [0, 8, 16, 15, 17]);
    // The highest of the model holds all others up.
    assert_eq!(start.next(&[0, 0, 0, 1 << 49, 0]).eighths(), [48, 48, 48, 176, 48]);
    let lowest = Exponents::from_eighths(vec![-776]);
    assert_eq!(lowest.next(&[0]).eighths(), [-776]);
    let highest = Exponents::from_eighths(vec![152 * 8]);
    assert_eq!(highest.next(&[u64::MAX]).eighths(), [152 * 8]);
}

fn values(length: usize, k: usize) -> Vec<f32> {
    (0..length).map(|index| ((index * k) % 1009) as f32 * 0.001 - 0.5).collect()
}

#[test]
fn the_norms_tree_is_pinned() {
    let values = values(2 * 4096 + 16 * 3 + 5, 37);
    // Sixteen lanes within a chunk, then lanes, then chunks.
    let mut norm = 0.0f64;
    for block in values.chunks(4096) {
        let mut lanes = [0.0f64; 16];
        block.iter().enumerate().for_each(|(index, &value)| lanes[index % 16] += f64::from(value).powi(2));
        norm += lanes.iter().sum::<f64>();
    }
    assert_eq!(mattock_exact::norm(chunk_squares(&values)).to_bits(), norm.sqrt().to_bits());
    let plain: f64 = values.iter().map(|&value| f64::from(value).powi(2)).sum();
    assert_ne!(norm.to_bits(), plain.to_bits(), "another order has other bits, so the test can tell");
}

#[test]
fn steps_of_the_update_are_pinned() {
    let optimizer = AdamW { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 };
    let length = 9_000;
    let mut parameters = values(length, 3);
    let (mut first, mut second) = (vec![0.0; length], vec![0.0; length]);
    let hashes: Vec<String> = (1..=3)
        .map(|step| {
            let numbers = AdamWStep::new(&optimizer, step, 1e-3, 0.7);
            let gradient = values(length, 11 + step as usize);
            let hash = adamw(&mut parameters, &mut first, &mut second, &gradient, &numbers, 5);
            format!("{hash:016x}")
        })
        .collect();
    assert_eq!(hashes, ["d7b0a4f30872b7dc", "d6d8b3ffec49ed1e", "197edeb71a341c9b"]);
    let exponents = Exponents::from_eighths(vec![-776, 0, 33]);
    assert_eq!(format!("{:016x}", exponent_hash(&exponents)), "c529fdbe448baabe");
    assert_eq!(format!("{:016x}", state_hash(&parameters, &first, &second, &exponents)), "879ee3348a68444a");
}

macro_rules! panics {
    ($($name:ident: $expected:literal, $body:expr;)+) => {
        $(
            #[test]
            #[should_panic(expected = $expected)]
            fn $name() {
                $body;
            }
        )+
    };
}

panics! {
    a_sum_has_a_word_per_element: "one word per element",
        Accumulator::new(1, of(1)).add(&mut [0; BLOCK], &[0.0; 2 * BLOCK], &[0, 0], &PLAIN);
    a_sum_has_an_exponent_per_block: "one exponent per block",
        Accumulator::new(2, of(1)).add(&mut [0; 2 * BLOCK], &[0.0; 2 * BLOCK], &[0], &PLAIN);
    a_wide_sum_has_a_word_per_element: "one word per element",
        WideAccumulator::new(1, of(1)).add(&mut [0; BLOCK], &[0.0; 2 * BLOCK], &[0, 0], &PLAIN);
    a_wide_sum_has_an_exponent_per_block: "one exponent per block",
        WideAccumulator::new(2, of(1)).add(&mut [0; 2 * BLOCK], &[0.0; 2 * BLOCK], &[0], &PLAIN);
    a_mean_has_a_sum_per_element: "one sum per element",
        decode(&[0; 4 * BLOCK], &[0, 0], &of(1), &mut [0.0; 2 * BLOCK]);
    a_mean_has_an_exponent_per_block: "one exponent per block",
        decode(&[0; 8 * BLOCK], &[0], &of(1), &mut [0.0; 2 * BLOCK]);
    a_wide_mean_has_a_sum_per_element: "one sum per element",
        decode_wide(&[0; BLOCK], &[0, 0], &of(1), &mut [0.0; 2 * BLOCK]);
    a_wide_mean_has_an_exponent_per_block: "one exponent per block",
        decode_wide(&[0; 2 * BLOCK], &[0], &of(1), &mut [0.0; 2 * BLOCK]);
    next_exponents_need_a_bound_per_block: "one bound per block",
        drop(Exponents::from_eighths(vec![0]).next(&[]));
    an_update_needs_moments_of_its_length: "belong to the same stretch",
        adamw(&mut [0.0], &mut [], &mut [0.0], &[0.0],
            &AdamWStep::new(&AdamW { betas: [0.9, 0.9], eps: 1.0, weight_decay: 0.0 }, 1, 1.0, 1.0), 0);
    an_update_needs_second_moments_of_its_length: "belong to the same stretch",
        adamw(&mut [0.0], &mut [0.0], &mut [], &[0.0],
            &AdamWStep::new(&AdamW { betas: [0.9, 0.9], eps: 1.0, weight_decay: 0.0 }, 1, 1.0, 1.0), 0);
    an_update_needs_a_gradient_of_its_length: "belong to the same stretch",
        adamw(&mut [0.0], &mut [0.0], &mut [0.0], &[],
            &AdamWStep::new(&AdamW { betas: [0.9, 0.9], eps: 1.0, weight_decay: 0.0 }, 1, 1.0, 1.0), 0);
}
