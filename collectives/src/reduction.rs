//! What travels, and how two of it become one.
//!
//! An [`Element`] is plain old data in little-endian order; a [`Reduction`] combines two elements. The loop over
//! many of them lives in [`combine_into`], written so that compilers turn it into SIMD: the own input is aligned,
//! what arrived is bytes at any address.
//!
//! Integer reductions do not care about order. Floating-point sums do: a ring adds in the order of ranks, so their
//! bits are a function of the world size, and of nothing else; where some ranks share a host, also of who does. What a
//! reduction does once at the end, as [`Mean`] does, it does in the last combination of each element: there is no further
//! pass over memory.

use std::cmp::Ordering;
use std::marker::PhantomData;

use half::{bf16, f16};

use crate::rank::WorldSize;

#[cfg(target_endian = "big")]
compile_error!("elements travel as they lie in memory, which must be little-endian");

/// The type of an element, as it is named on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ElementKind {
    /// IEEE 754 single precision.
    F32 = 1,
    /// The upper half of an `f32`.
    Bf16 = 2,
    /// 32-bit two's complement.
    I32 = 3,
    /// 64-bit two's complement.
    I64 = 4,
    /// 32-bit unsigned.
    U32 = 5,
    /// A byte.
    U8 = 6,
    /// IEEE 754 double precision.
    F64 = 7,
    /// IEEE 754 half precision.
    F16 = 8,
    /// 16-bit two's complement.
    I16 = 9,
    /// [`I24`].
    I24 = 10,
    /// [`I12x2`].
    I12x2 = 11,
}

impl ElementKind {
    pub(crate) const ALL: [Self; 11] = [
        Self::F32,
        Self::Bf16,
        Self::I32,
        Self::I64,
        Self::U32,
        Self::U8,
        Self::F64,
        Self::F16,
        Self::I16,
        Self::I24,
        Self::I12x2,
    ];

    /// How many bytes one element takes.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 | Self::F16 | Self::I16 => 2,
            Self::I24 | Self::I12x2 => 3,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::I64 | Self::F64 => 8,
        }
    }
}

/// A kind of reduction, as it is named on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ReductionKind {
    /// [`Sum`].
    Sum = 1,
    /// [`SaturatingSum`].
    SaturatingSum = 2,
    /// [`Min`].
    Min = 3,
    /// [`Max`].
    Max = 4,
    /// [`Mean`].
    Mean = 5,
}

impl ReductionKind {
    pub(crate) const ALL: [Self; 5] = [Self::Sum, Self::SaturatingSum, Self::Min, Self::Max, Self::Mean];
}

/// 24-bit two's complement, the low byte first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct I24(pub [u8; 3]);

/// Two integers of 12 bits in two's complement, side by side in three bytes: the first in the low bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct I12x2(pub [u8; 3]);

macro_rules! plain_bytes {
    ($($element:ty),+) => {
        $(
            // SAFETY: it is an array of bytes and nothing else: any bits are valid, zeros too, and there is no padding.
            unsafe impl bytemuck::Zeroable for $element {}
            // SAFETY: as above.
            unsafe impl bytemuck::Pod for $element {}
        )+
    };
}

plain_bytes!(I24, I12x2);

/// The three bytes as the low ones of a word, and back.
#[inline(always)]
fn widen_three([a, b, c]: [u8; 3]) -> u32 {
    u32::from_le_bytes([a, b, c, 0])
}

#[inline(always)]
fn narrow_to_three(word: u32) -> [u8; 3] {
    let [a, b, c, _] = word.to_le_bytes();
    [a, b, c]
}

/// Plain data that can travel: its bytes in memory are its bytes on the wire.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// Its name on the wire.
    const KIND: ElementKind;
    /// Its bytes as they arrive: at any address.
    type Wire: bytemuck::Pod;
    /// The element of these bytes.
    fn from_wire(wire: Self::Wire) -> Self;
}

/// How two elements become one, and what becomes of the one that all have been combined to.
pub trait Reduction: Send + Sync + 'static {
    /// What is combined.
    type Element: Element;
    /// Its name on the wire.
    const KIND: ReductionKind;
    /// Combines this rank's element with the one that arrived.
    fn combine(own: Self::Element, arrived: Self::Element) -> Self::Element;

    /// Whether [`finish`](Self::finish) does anything.
    const FINISHES: bool = false;
    /// Makes the result of what the elements of all `ranks` were combined to: once, at the end. A rank that is alone has
    /// nothing to combine, and nothing to finish.
    fn finish(combined: Self::Element, ranks: WorldSize) -> Self::Element {
        let _ = ranks;
        combined
    }
}

/// Addition: wrapping for integers, rounding once per addition for floating point (`bf16` and `f16` add as `f32`).
#[derive(Clone, Copy, Debug)]
pub struct Sum<E>(PhantomData<E>);

/// The [`Sum`] of floats, divided by the number of ranks: rounded once for each addition, and once for the division.
#[derive(Clone, Copy, Debug)]
pub struct Mean<E>(PhantomData<E>);

/// The smallest of all ranks, whatever the order: of floats in IEEE 754's total order, in which -0 is below 0 and NaN, by its
/// sign, below or above everything else.
#[derive(Clone, Copy, Debug)]
pub struct Min<E>(PhantomData<E>);

/// The largest of all ranks; see [`Min`].
#[derive(Clone, Copy, Debug)]
pub struct Max<E>(PhantomData<E>);

/// Addition that stops at the largest value: `min(sum, u32::MAX)` of all ranks, whatever the order.
#[derive(Clone, Copy, Debug)]
pub struct SaturatingSum;

macro_rules! elements {
    ($($element:ty => $kind:ident),+ $(,)?) => {
        $(impl Element for $element {
            const KIND: ElementKind = ElementKind::$kind;
            type Wire = [u8; size_of::<$element>()];
            #[inline(always)]
            fn from_wire(wire: Self::Wire) -> Self { Self::from_le_bytes(wire) }
        })+
    };
}

elements!(
    f32 => F32, f64 => F64, f16 => F16, bf16 => Bf16, i16 => I16, i32 => I32, i64 => I64, u32 => U32, u8 => U8,
    I24 => I24, I12x2 => I12x2,
);

impl I24 {
    #[inline(always)]
    fn from_le_bytes(bytes: [u8; 3]) -> Self {
        Self(bytes)
    }
}

impl I12x2 {
    #[inline(always)]
    fn from_le_bytes(bytes: [u8; 3]) -> Self {
        Self(bytes)
    }

    /// Adds both; the top bit of each is added by itself, so that nothing is carried from one into the other.
    #[inline(always)]
    fn wrapping_add(self, other: Self) -> Self {
        const TOPS: u32 = 0x80_0800;
        let (a, b) = (widen_three(self.0), widen_three(other.0));
        Self(narrow_to_three(((a & !TOPS) + (b & !TOPS)) ^ ((a ^ b) & TOPS)))
    }
}

macro_rules! sums {
    ($($element:ty => |$own:ident, $arrived:ident| $sum:expr),+ $(,)?) => {
        $(impl Reduction for Sum<$element> {
            type Element = $element;
            const KIND: ReductionKind = ReductionKind::Sum;
            #[inline(always)]
            fn combine($own: $element, $arrived: $element) -> $element { $sum }
        })+
    };
}

sums!(
    f32 => |own, arrived| own + arrived,
    f64 => |own, arrived| own + arrived,
    bf16 => |own, arrived| round_to_bf16(widen(own) + widen(arrived)),
    f16 => |own, arrived| f16::from_f32(own.to_f32() + arrived.to_f32()),
    i16 => |own, arrived| own.wrapping_add(arrived),
    I24 => |own, arrived| I24(narrow_to_three(widen_three(own.0).wrapping_add(widen_three(arrived.0)))),
    I12x2 => |own, arrived| own.wrapping_add(arrived),
    i32 => |own, arrived| own.wrapping_add(arrived),
    i64 => |own, arrived| own.wrapping_add(arrived),
    u32 => |own, arrived| own.wrapping_add(arrived),
    u8 => |own, arrived| own.wrapping_add(arrived),
);

macro_rules! means {
    ($($element:ty => |$sum:ident, $ranks:ident| $mean:expr),+ $(,)?) => {
        $(impl Reduction for Mean<$element> {
            type Element = $element;
            const KIND: ReductionKind = ReductionKind::Mean;
            const FINISHES: bool = true;
            #[inline(always)]
            fn combine(own: $element, arrived: $element) -> $element { Sum::<$element>::combine(own, arrived) }
            #[inline(always)]
            fn finish($sum: $element, ranks: WorldSize) -> $element {
                let $ranks = ranks.get();
                $mean
            }
        })+
    };
}

means!(
    f32 => |sum, ranks| sum / ranks as f32,
    f64 => |sum, ranks| sum / f64::from(ranks),
    bf16 => |sum, ranks| round_to_bf16(widen(sum) / ranks as f32),
    f16 => |sum, ranks| f16::from_f32(sum.to_f32() / ranks as f32),
);

macro_rules! extremes {
    ($($element:ty => $order:ident),+ $(,)?) => {
        $(impl Reduction for Min<$element> {
            type Element = $element;
            const KIND: ReductionKind = ReductionKind::Min;
            #[inline(always)]
            fn combine(own: $element, arrived: $element) -> $element {
                if arrived.$order(&own) == Ordering::Less { arrived } else { own }
            }
        }
        impl Reduction for Max<$element> {
            type Element = $element;
            const KIND: ReductionKind = ReductionKind::Max;
            #[inline(always)]
            fn combine(own: $element, arrived: $element) -> $element {
                if arrived.$order(&own) == Ordering::Greater { arrived } else { own }
            }
        })+
    };
}

extremes!(
    f32 => total_cmp, f64 => total_cmp, f16 => total_cmp, bf16 => total_cmp,
    i16 => cmp, i32 => cmp, i64 => cmp, u32 => cmp, u8 => cmp,
);

impl Reduction for SaturatingSum {
    type Element = u32;
    const KIND: ReductionKind = ReductionKind::SaturatingSum;
    #[inline(always)]
    fn combine(own: u32, arrived: u32) -> u32 {
        own.saturating_add(arrived)
    }
}

/// As `bf16::to_f32`, but without branches, for SIMD.
#[inline(always)]
fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// As `bf16::from_f32`, to nearest and ties to even, but without branches, for SIMD.
#[inline(always)]
fn round_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet_nan } else { rounded } as u16)
}

/// As [`combine_into`].
#[inline(always)]
fn combine_loop<R: Reduction>(own: &[R::Element], arrived: &[u8], out: &mut [R::Element], last: Last) {
    let arrived: &[<R::Element as Element>::Wire] = bytemuck::cast_slice(arrived);
    assert_eq!((own.len(), arrived.len()), (out.len(), out.len()));
    let elements = out.iter_mut().zip(own).zip(arrived);
    let combine = |own: &R::Element, arrived: &<R::Element as Element>::Wire| {
        R::combine(*own, R::Element::from_wire(*arrived))
    };
    match last.filter(|_| R::FINISHES) {
        None => elements.for_each(|((out, own), arrived)| *out = combine(own, arrived)),
        Some(ranks) => {
            elements.for_each(|((out, own), arrived)| *out = R::finish(combine(own, arrived), ranks));
        }
    }
}

/// Whether a combination is the last of its element, and then over how many ranks.
pub(crate) type Last = Option<WorldSize>;

/// A reduction with its type forgotten, over whole elements that are aligned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fold {
    /// Bytes of an element.
    pub(crate) element_bytes: usize,
    /// `out[i] = combine(own[i], arrived[i])`, in the order (arrived, own, out).
    pub(crate) pair: fn(&[u8], &[u8], &mut [u8], Last),
    /// `sum[i] = combine(own[i], sum[i])`, in the order (sum, own).
    pub(crate) add: fn(&mut [u8], &[u8], Last),
    /// Other ranks are to be added elsewhere: no combination here is the last.
    pub(crate) is_partial: bool,
}

impl Fold {
    pub(crate) fn of<R: Reduction>() -> Self {
        let element_bytes = size_of::<R::Element>();
        Self { element_bytes, pair: pair::<R>, add: add_widest::<R>, is_partial: false }
    }
}

fn pair<R: Reduction>(arrived: &[u8], own: &[u8], out: &mut [u8], last: Last) {
    combine_into::<R>(bytemuck::cast_slice(own), arrived, bytemuck::cast_slice_mut(out), last);
}

#[inline(always)]
fn add<R: Reduction>(sum: &mut [u8], own: &[u8], last: Last) {
    let (sum, own): (&mut [R::Element], &[R::Element]) =
        (bytemuck::cast_slice_mut(sum), bytemuck::cast_slice(own));
    assert_eq!(sum.len(), own.len());
    let elements = sum.iter_mut().zip(own);
    match last.filter(|_| R::FINISHES) {
        None => elements.for_each(|(sum, own)| *sum = R::combine(*own, *sum)),
        Some(ranks) => elements.for_each(|(sum, own)| *sum = R::finish(R::combine(*own, *sum), ranks)),
    }
}

/// Defines a function that runs a loop compiled for the widest vectors that the processor has. No loop here fuses
/// multiplication and addition, so all give the same bits.
macro_rules! widest {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<R>($($arg:ident: $type:ty),*) = $inner:ident) => {
        $(#[$meta])*
        $vis fn $name<R: Reduction>($($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512<R: Reduction>($($arg: $type),*) { $inner::<R>($($arg),*) }
                #[target_feature(enable = "avx2")]
                fn avx2<R: Reduction>($($arg: $type),*) { $inner::<R>($($arg),*) }
                if std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has the features that the function was compiled for.
                    return unsafe { avx512::<R>($($arg),*) };
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2::<R>($($arg),*) };
                }
            }
            $inner::<R>($($arg),*);
        }
    };
}

widest! {
    /// `out[i] = combine(own[i], arrived[i])`, where `arrived` holds as many elements at any alignment. In the `last`
    /// combination of all those ranks' elements, the result is finished.
    pub(crate) fn combine_into<R>(
        own: &[R::Element], arrived: &[u8], out: &mut [R::Element], last: Last
    ) = combine_loop
}
widest! {
    fn add_widest<R>(sum: &mut [u8], own: &[u8], last: Last) = add
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rounding_to_bf16_is_that_of_the_half_crate(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            prop_assert_eq!(round_to_bf16(x).to_bits(), bf16::from_f32(x).to_bits());
        }
    }

    proptest! {
        #[test]
        fn integers_of_three_bytes_are_added_as_others(a in any::<[u8; 3]>(), b in any::<[u8; 3]>()) {
            let sum = widen_three(a).wrapping_add(widen_three(b));
            prop_assert_eq!(combined::<Sum<I24>>(&[I24(a)], &[I24(b)]), [I24(narrow_to_three(sum))]);
            let halves = |x: [u8; 3]| [widen_three(x) & 0xfff, widen_three(x) >> 12];
            let [low, high] = [0, 1].map(|half| (halves(a)[half] + halves(b)[half]) & 0xfff);
            let expected = I12x2(narrow_to_three(low | high << 12));
            prop_assert_eq!(combined::<Sum<I12x2>>(&[I12x2(a)], &[I12x2(b)]), [expected]);
        }
    }

    fn combined<R: Reduction>(own: &[R::Element], arrived: &[R::Element]) -> Vec<R::Element> {
        // One byte of offset: what arrives is aligned to nothing.
        let mut bytes = vec![0u8];
        bytes.extend_from_slice(bytemuck::cast_slice(arrived));
        let mut out = vec![bytemuck::Zeroable::zeroed(); own.len()];
        combine_into::<R>(own, &bytes[1..], &mut out, WorldSize::new(2));
        out
    }

    #[test]
    fn integers_wrap() {
        assert_eq!(combined::<Sum<i32>>(&[i32::MAX, -1], &[1, 1]), [i32::MIN, 0]);
        assert_eq!(combined::<Sum<i64>>(&[i64::MIN], &[-1]), [i64::MAX]);
    }

    #[test]
    fn bounds_saturate() {
        assert_eq!(combined::<SaturatingSum>(&[u32::MAX, 2], &[1, 3]), [u32::MAX, 5]);
    }

    #[test]
    fn extremes_follow_the_total_order() {
        assert_eq!(combined::<Min<i32>>(&[3, -1], &[2, 5]), [2, -1]);
        assert_eq!(combined::<Max<u8>>(&[3, 200], &[2, 201]), [3, 201]);
        let signs = |zeros: Vec<f32>| zeros.iter().map(|zero| zero.is_sign_negative()).collect::<Vec<_>>();
        assert_eq!(signs(combined::<Min<f32>>(&[0.0, -0.0], &[-0.0, 0.0])), [true, true]);
        assert_eq!(signs(combined::<Max<f32>>(&[0.0, -0.0], &[-0.0, 0.0])), [false, false]);
        assert!(
            combined::<Max<f64>>(&[f64::NAN, f64::INFINITY], &[1.0, f64::NAN]).iter().all(|x| x.is_nan())
        );
        assert_eq!(combined::<Min<f16>>(&[f16::NAN], &[f16::ONE]), [f16::ONE]);
    }

    #[test]
    fn bf16_adds_in_f32_and_rounds_to_even() {
        let one = bf16::from_f32(1.0);
        let half_step = bf16::from_f32(2f32.powi(-8));
        assert_eq!(combined::<Sum<bf16>>(&[one], &[half_step]), [one]);
        assert_eq!(combined::<Sum<bf16>>(&[one], &[one]), [bf16::from_f32(2.0)]);
    }

    #[test]
    fn means_divide_once_and_round_as_their_element_does() {
        assert_eq!(combined::<Mean<f32>>(&[1.0, f32::MAX], &[2.0, f32::MAX]), [1.5, f32::INFINITY]);
        assert_eq!(combined::<Mean<f16>>(&[f16::MAX], &[-f16::ONE]), [f16::from_f32(32752.0)]);
        let third = |sum| Mean::<bf16>::finish(bf16::from_f32(sum), WorldSize::new(3).unwrap());
        assert_eq!(third(1.0), bf16::from_f32(1.0 / 3.0));
        assert_eq!(Mean::<f64>::finish(0.3, WorldSize::new(3).unwrap()), 0.3 / 3.0);
        assert_eq!(Sum::<f32>::finish(3.0, WorldSize::new(3).unwrap()), 3.0);
    }
}
