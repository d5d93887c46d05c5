//! The last operations of a rank, with times: what to look at when one has failed.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::collective::OpId;
use crate::error::CollectiveError;

/// Operations that are kept.
const KEPT: usize = 32;

/// Keeps the last operations of a group.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    records: Mutex<VecDeque<Record>>,
}

/// One operation of this rank, as a [`Group`](crate::Group) remembers it.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its name.
    pub op: OpId,
    /// Bytes of the whole payload.
    pub bytes: u64,
    /// When it was submitted. Small operations are done before a clock is read.
    pub submitted: Option<Instant>,
    /// How it ended; nothing yet where it is pending.
    pub end: Option<End>,
}

/// How an operation ended.
#[derive(Clone, Debug)]
pub struct End {
    /// After the submission, where that is known.
    pub after: Option<Duration>,
    /// What went wrong, if anything did.
    pub error: Option<String>,
}

impl Recorder {
    /// An operation was submitted.
    pub(crate) fn begin(&self, op: OpId, bytes: u64) {
        self.keep(Record { op, bytes, submitted: Some(Instant::now()), end: None });
    }

    /// An operation has ended.
    pub(crate) fn end<T>(&self, op: OpId, outcome: &Result<T, CollectiveError>) {
        let mut records = self.lock();
        if let Some(record) = records.iter_mut().rev().find(|record| record.op == op) {
            let after = record.submitted.map(|submitted| submitted.elapsed());
            record.end = Some(End { after, error: outcome.as_ref().err().map(ToString::to_string) });
        }
    }

    /// A small operation was submitted and has ended.
    pub(crate) fn begin_and_end<T>(&self, op: OpId, bytes: u64, outcome: &Result<T, CollectiveError>) {
        let end = End { after: None, error: outcome.as_ref().err().map(ToString::to_string) };
        self.keep(Record { op, bytes, submitted: None, end: Some(end) });
    }

    fn keep(&self, record: Record) {
        let mut records = self.lock();
        if records.len() == KEPT {
            records.pop_front();
        }
        records.push_back(record);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is kept, the oldest first.
    pub(crate) fn records(&self) -> Vec<Record> {
        self.lock().iter().cloned().collect()
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, bytes, submitted, end } = self;
        write!(f, "{op}, {bytes} bytes, ")?;
        if let Some(submitted) = submitted {
            write!(f, "submitted {:.6} s ago, ", submitted.elapsed().as_secs_f64())?;
        }
        match end {
            None => f.write_str("pending"),
            Some(End { error: Some(error), .. }) => write!(f, "failed: {error}"),
            Some(End { after: Some(after), .. }) => write!(f, "done after {:.6} s", after.as_secs_f64()),
            Some(End { after: None, .. }) => f.write_str("done"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rank;
    use crate::collective::Collective;

    fn op(sequence: u64) -> OpId {
        OpId { sequence, collective: Collective::AllReduce }
    }

    #[test]
    fn the_last_operations_are_kept_and_told() {
        let recorder = Recorder::default();
        for sequence in 0..40 {
            recorder.begin(op(sequence), 100);
            if sequence < 38 {
                recorder.end(op(sequence), &Ok(()));
            }
        }
        let refused = CollectiveError::InvalidInput { rank: Rank(1), reason: "nonsense".into() };
        recorder.end(op(38), &Err::<(), _>(refused));
        assert!(recorder.records()[31].to_string().ends_with("pending"));
        recorder.begin_and_end(op(40), 4, &Ok(()));
        let told: Vec<String> = recorder.records().iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), KEPT);
        assert!(
            told[0].starts_with("all-reduce #9, 100 bytes") && told[0].contains("done after"),
            "{}",
            told[0]
        );
        assert!(told[29].contains("failed: rank 1: nonsense"), "{}", told[29]);
        assert_eq!(told[31], "all-reduce #40, 4 bytes, done");
    }
}
