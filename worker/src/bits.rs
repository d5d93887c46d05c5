//! How many bits of a sum a link is worth: the policy of `bits = "auto"`.
//!
//! Exact sums of fewer bits cross a slow link sooner and are coarser. So: as many bits as cross the link in a fair share of the
//! time that a step computes anyway, and never so few that training is known to suffer.
//!
//! The choice is part of what defines a result, so it is made once, by the links of the first ring, and belongs into the
//! run's record with its reason: a run that is resumed, or moves to faster links, keeps it.
//!
//! Deliberately absent: the measuring, and the record (`session/training/choice.rs`).

use mattock_exact::{BLOCK, Bits};

/// Of a step's computing, what the exchange may take; about as much of it is hidden behind the backward pass.
const FAIR_SHARE: f64 = 0.25;
/// What is still as good as 32 bits in training: fewer are for those who ask for them.
const FEWEST: Bits = Bits::B12;

/// What the choice depends on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Circumstances {
    /// Elements of the gradient.
    pub parameters: u64,
    /// Micro-batches of a step.
    pub micro_batches: u32,
    /// What an all-reduce does in a second, of a payload as long as the gradient.
    pub payload_bytes_per_second: f64,
    /// What a step takes without its exchange.
    pub compute_seconds: f64,
}

/// The bits, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// How many.
    pub bits: Bits,
    /// For the log and the run's record.
    pub reason: String,
}

/// What workers choose who have no links between hosts: nothing is won by fewer bits there.
pub fn without_links(ranks: u32) -> Choice {
    let why = if ranks == 1 { "there is one worker, and no link" } else { "all workers share a host" };
    Choice { bits: Bits::B32, reason: format!("{} bits: {why}", Bits::B32.count()) }
}

/// As many bits as the links carry in their share of a step.
pub fn choose(circumstances: &Circumstances) -> Choice {
    let Circumstances { micro_batches, payload_bytes_per_second, compute_seconds, .. } = *circumstances;
    let may_take = FAIR_SHARE * compute_seconds;
    let allowed = |bits: &Bits| *bits >= FEWEST && bits.micro_batches_max() >= micro_batches;
    let fits = |bits: &Bits| exchange_seconds(circumstances, *bits) <= may_take;
    let fewest = Bits::ALL.into_iter().find(allowed).unwrap_or(Bits::B32);
    let most = Bits::ALL.into_iter().rev().filter(allowed).find(fits);
    let bits = most.unwrap_or(fewest);
    let limit = if most.is_some() { "" } else { ", and fewer bits are too coarse" };
    let reason = format!(
        "{} bits: the sums take {:.3} s where an all-reduce does {:.1} MB/s ({:.3} s in 32 bits), of which {:.3} s may be theirs \
         beside {:.3} s of computing{limit}",
        bits.count(),
        exchange_seconds(circumstances, bits),
        payload_bytes_per_second / 1e6,
        exchange_seconds(circumstances, Bits::B32),
        may_take,
        compute_seconds,
    );
    Choice { bits, reason }
}

/// What sums of these bits take with their bounds.
fn exchange_seconds(circumstances: &Circumstances, bits: Bits) -> f64 {
    let Circumstances { parameters, payload_bytes_per_second, .. } = *circumstances;
    let bytes_an_element = f64::from(bits.count()) / 8.0 + size_of::<u32>() as f64 / BLOCK as f64;
    parameters as f64 * bytes_an_element / payload_bytes_per_second
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 million parameters, a step of 10 s.
    fn where_an_all_reduce_does(megabytes_per_second: f64) -> Choice {
        choose(&Circumstances {
            parameters: 100_000_000,
            micro_batches: 32,
            payload_bytes_per_second: megabytes_per_second * 1e6,
            compute_seconds: 10.0,
        })
    }

    #[test]
    fn as_many_bits_as_the_links_carry_in_a_quarter_of_the_step() {
        // 32 bits are 400 MB.
        for (rate, bits) in [
            (833.0, Bits::B32),
            (161.3, Bits::B32),
            (160.0, Bits::B24),
            (100.0, Bits::B16),
            (66.0, Bits::B12),
            (0.7, Bits::B12),
            (0.0, Bits::B12),
        ] {
            assert_eq!(where_an_all_reduce_does(rate).bits, bits, "{rate} MB/s");
        }
    }

    #[test]
    fn the_reason_names_what_was_weighed() {
        let reason = where_an_all_reduce_does(100.0).reason;
        assert_eq!(
            reason,
            "16 bits: the sums take 2.016 s where an all-reduce does 100.0 MB/s (4.016 s in 32 bits), of which 2.500 s may be \
             theirs beside 10.000 s of computing"
        );
        assert!(where_an_all_reduce_does(1.0).reason.ends_with(", and fewer bits are too coarse"));
        assert_eq!(without_links(1).reason, "32 bits: there is one worker, and no link");
        assert_eq!(
            without_links(2),
            Choice { bits: Bits::B32, reason: "32 bits: all workers share a host".to_owned() }
        );
    }

    #[test]
    fn many_micro_batches_take_more_bits() {
        let slow = Circumstances {
            parameters: 1 << 30,
            micro_batches: 512,
            payload_bytes_per_second: 1.0,
            compute_seconds: 1.0,
        };
        assert_eq!(choose(&slow).bits, Bits::B12);
        assert_eq!(choose(&Circumstances { micro_batches: 513, ..slow }).bits, Bits::B16);
    }
}
