//! How many bits a run's sums have, where its recipe leaves that open: the first ring chooses, and what it chose is kept beside
//! the checkpoints for good.
//!
//! ```text
//! any rank knows ── else rank 0 reads the record ── else all measure ─ rank 0 chooses, writes the record ─┬─ all use it
//!        └───────────────────────┴────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! # Invariants
//! 1. Nothing is rounded before the record is written, so whoever comes later, or resumes, finds it.
//! 2. A record is never changed: of two that are written at once the store lets one win, and both writers take that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mattock_checkpoint::{Location, Records};
use mattock_collectives::{Buffer, Group, Max, Sum, Transport};
use mattock_coordinator::protocol::FromWorker;
use mattock_exact::Bits;
use mattock_kernels::TrainBackend;
use serde::{Deserialize, Serialize};

use super::{Interruption, Seat, Training, wrapped};
use crate::bits::{Choice, Circumstances, choose, without_links};
use crate::gate::Gate;
use crate::session::SessionError;
use crate::storage::StorageError;
use crate::task::Task;

/// The folder of records, in the location of the checkpoints.
const FOLDER: &str = "bits";
const FORMAT: u32 = 1;
/// A payload is long enough to tell a rate by if it takes so long,
const LONG_ENOUGH: Duration = Duration::from_millis(200);
/// or is as long as this,
const BYTES_MAX: usize = 64 << 20;
/// and the first one is as long as this.
const BYTES_MIN: usize = 256 << 10;

/// What was chosen, as it is kept. A location may have held other runs before, so the run is named, and the newest of its records holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    format: u32,
    run: String,
    bits: u32,
    reason: String,
    /// So that a writer knows its own record from another's.
    by: String,
}

/// What a run has chosen.
struct Choices<'a> {
    records: Records,
    run: &'a str,
    /// Who asks: no other writer is called so.
    by: String,
}

impl Choices<'_> {
    /// What this run has chosen, if it has; else after which number the next record comes.
    fn read(&self) -> Result<Result<Bits, u64>, StorageError> {
        let Some((number, record)) = self.records.newest(0)? else { return Ok(Err(0)) };
        let unreadable = |what: String| StorageError::Choice { url: self.records.url(number), what };
        let record: Record =
            serde_json::from_slice(&record).map_err(|error| unreadable(error.to_string()))?;
        if record.run != self.run {
            return Ok(Err(number));
        }
        let bits = Bits::ALL.into_iter().find(|bits| bits.count() == record.bits);
        let bits = bits.filter(|_| record.format == FORMAT);
        let told = || format!("format {} with {} bits is not known here", record.format, record.bits);
        bits.map(Ok).ok_or_else(|| unreadable(told()))
    }

    /// Keeps a choice, unless there is one meanwhile; what holds then.
    fn keep(&self, choice: &Choice) -> Result<Bits, StorageError> {
        loop {
            let after = match self.read()? {
                Ok(bits) => return Ok(bits),
                Err(after) => after,
            };
            let (run, by) = (self.run.to_owned(), self.by.clone());
            let (bits, reason) = (choice.bits.count(), choice.reason.clone());
            let record = Record { format: FORMAT, run, bits, reason, by };
            let json = serde_json::to_vec_pretty(&record).expect("texts and numbers");
            // Whoever was faster is of this run, or has the next number left: each turn ends one writer.
            if self.records.create(after + 1, &json)? {
                return Ok(choice.bits);
            }
        }
    }
}

impl<'a, B: TrainBackend, T: Task> Training<'a, B, T> {
    /// Makes sure that all ranks of a ring round to the same bits, before one of them rounds anything.
    pub(super) fn settle_bits(&mut self, seat: &Seat) -> Result<(), Interruption> {
        if !self.plan.reduce.auto {
            return Ok(());
        }
        let bits = match self.agreed(seat, self.bits)? {
            Some(bits) => bits,
            None => self.choose_bits(seat)?,
        };
        if self.bits.replace(bits).is_none() {
            self.trainer.use_bits(bits);
        }
        Ok(())
    }

    /// What the run has chosen before, or the first ring's choice.
    fn choose_bits(&mut self, seat: &Seat) -> Result<Bits, Interruption> {
        let choices = match seat.rank {
            0 => Some(self.choices(seat)?),
            _ => None,
        };
        let chosen = match &choices {
            Some(choices) => choices.read().map_err(SessionError::from)?.ok(),
            None => None,
        };
        if let Some(bits) = self.agreed(seat, chosen)? {
            self.tell_bits(seat, format!("{} bits, as this run's record says", bits.count()));
            return Ok(bits);
        }
        let choice = self.weigh(seat)?;
        let kept = match &choices {
            Some(choices) => Some(choices.keep(&choice).map_err(SessionError::from)?),
            None => None,
        };
        self.tell_bits(seat, choice.reason);
        let nobody = || SessionError::Nonsense("a ring without a rank 0".to_owned());
        self.agreed(seat, kept)?.ok_or_else(|| nobody().into())
    }

    fn choices(&self, seat: &Seat) -> Result<Choices<'a>, SessionError> {
        let location = Location::parse(&self.settings.checkpoints).map_err(StorageError::from)?;
        let (host, pid, generation) = (crate::host::name(), std::process::id(), seat.formation.generation);
        let by = format!("process {pid} of {host}, worker {}, ring {generation}", self.worker.id);
        Ok(Choices { records: Records::new(location, FOLDER), run: &self.worker.run, by })
    }

    fn tell_bits(&self, seat: &Seat, text: String) {
        if seat.rank == 0 {
            let text = format!("reduce.bits = \"auto\": {text}");
            self.worker.control.report(FromWorker::Notice { text });
        }
    }

    /// What some rank knows; all ask.
    fn agreed(&self, seat: &Seat, known: Option<Bits>) -> Result<Option<Bits>, Interruption> {
        let count = most(seat, self.worker.control.gate(), [known.map_or(0, |bits| bits.count().into())])?[0];
        Ok(Bits::ALL.into_iter().find(|bits| i64::from(bits.count()) == count))
    }

    /// Measures what the choice depends on, all ranks together, and chooses.
    fn weigh(&mut self, seat: &Seat) -> Result<Choice, Interruption> {
        let gate = self.worker.control.gate();
        let machine = self.faults.machine.unwrap_or_else(crate::host::machine);
        let [highest, lowest] = most(seat, gate, [machine, -machine])?;
        let world = seat.group.ring().world_size().get();
        if world == 1 || highest == -lowest || seat.group.transport() == Transport::SharedMemory {
            return Ok(without_links(world));
        }
        let parameters = self.trainer.space().len();
        let payload_bytes_per_second = rate(seat, gate, size_of::<i32>() * parameters)?;
        let seconds = self.trainer.try_out(&seat.group, gate).map_err(wrapped)?;
        let micros = self.faults.micros.map_or((seconds * 1e6) as i64, i64::from);
        let [micros] = most(seat, gate, [micros])?;
        let micro_batches = self.plan.batch.micro_batches();
        let compute_seconds = f64::from(micro_batches.div_ceil(world)) * micros as f64 / 1e6;
        let parameters = parameters as u64;
        Ok(choose(&Circumstances { parameters, micro_batches, payload_bytes_per_second, compute_seconds }))
    }
}

/// The largest number in each place that a rank has there.
fn most<const N: usize>(seat: &Seat, gate: &Gate, own: [i64; N]) -> Result<[i64; N], Interruption> {
    gate.wait();
    let own = Arc::new(Buffer::from(own.to_vec()));
    let most = seat.group.all_reduce_now::<Max<i64>>(own, Buffer::default());
    let most = most.map_err(|error| wrapped(error.into()))?;
    Ok(std::array::from_fn(|place| most[place]))
}

/// Bytes of a payload that an all-reduce of this group does in a second, where payloads have up to so many.
fn rate(seat: &Seat, gate: &Gate, bytes_max: usize) -> Result<f64, Interruption> {
    let bytes_max = bytes_max.min(BYTES_MAX);
    let mut bytes = BYTES_MIN.min(bytes_max);
    loop {
        let took = timed(&seat.group, gate, bytes)?;
        // So that all go on, or none.
        let [micros] = most(seat, gate, [took.as_micros() as i64])?;
        if micros as u128 >= LONG_ENOUGH.as_micros() || bytes == bytes_max {
            return Ok(bytes as f64 / (micros.max(1) as f64 / 1e6));
        }
        bytes = (4 * bytes).min(bytes_max);
    }
}

fn timed(group: &Group, gate: &Gate, bytes: usize) -> Result<Duration, Interruption> {
    let words = Arc::new(Buffer::from(vec![0i32; bytes / size_of::<i32>()]));
    gate.wait();
    let since = Instant::now();
    group.all_reduce_now::<Sum<i32>>(words, Buffer::default()).map_err(|error| wrapped(error.into()))?;
    Ok(since.elapsed())
}
