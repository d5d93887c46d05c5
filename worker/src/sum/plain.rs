//! Plain floating-point sums: fast, and deterministic for one world size and assignment only.

use std::ops::Range;

use half::bf16;
use mattock_collectives::{CollectiveError, Group, Sum};
use mattock_exact::Exponents;

use super::Summed;
use super::flight::Flight;
use crate::params::Space;
use crate::partition::Stretches;

/// Sums of f32, exchanged as they are or rounded to bf16.
pub(crate) struct PlainSum {
    mean: f32,
    buckets: Vec<Bucket>,
}

struct Bucket {
    sums: Vec<f32>,
    flight: Wire,
}

/// What travels.
enum Wire {
    Full(Flight<Sum<f32>>),
    Half(Flight<Sum<bf16>>),
}

impl PlainSum {
    pub(super) fn new(space: &Space, micro_batches: u32, half: bool) -> Self {
        let bucket = |range: &Range<usize>| Bucket {
            sums: vec![0.0; range.len()],
            flight: match half {
                false => Wire::Full(Flight::new(range.len())),
                true => Wire::Half(Flight::new(range.len())),
            },
        };
        Self { mean: 1.0 / micro_batches as f32, buckets: space.buckets().iter().map(bucket).collect() }
    }

    pub(super) fn begin(&mut self) {
        self.buckets.iter_mut().for_each(|bucket| bucket.sums.fill(0.0));
    }

    pub(super) fn add(&mut self, bucket: usize, gradient: &[f32]) {
        self.buckets[bucket].sums.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
    }

    pub(super) fn send(&mut self, bucket: usize, group: &Group, lens: Option<&[usize]>) {
        let Bucket { sums, flight, .. } = &mut self.buckets[bucket];
        match flight {
            Wire::Full(flight) => {
                flight.input_mut().copy_from_slice(sums);
                flight.send(group, lens);
            }
            Wire::Half(flight) => {
                flight.input_mut().iter_mut().zip(sums).for_each(|(half, sum)| *half = bf16::from_f32(*sum));
                flight.send(group, lens);
            }
        }
    }

    pub(super) fn nonfinite(&self) -> bool {
        self.buckets.iter().any(|bucket| bucket.sums.iter().any(|sum| !sum.is_finite()))
    }

    pub(super) fn finish(
        &mut self,
        exponents: &Exponents,
        own: &Stretches,
        gradient: &mut [f32],
    ) -> Result<Summed, CollectiveError> {
        for (index, bucket) in self.buckets.iter_mut().enumerate() {
            let out = gradient[own.within(index)].iter_mut();
            match &mut bucket.flight {
                Wire::Full(flight) => out.zip(flight.wait()?).for_each(|(out, sum)| *out = sum * self.mean),
                Wire::Half(flight) => {
                    out.zip(flight.wait()?).for_each(|(out, sum)| *out = sum.to_f32() * self.mean);
                }
            }
        }
        Ok(Summed { exponents: exponents.clone(), wide_blocks: 0 })
    }
}
