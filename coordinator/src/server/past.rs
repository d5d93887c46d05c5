//! A server that has taken over: from what the workers who come back tell, to the ledger that the dead coordinator had.

use std::time::Instant;

use super::Ending;
use super::core::{Core, failed, misreport};
use super::tenure::Tenure;
use crate::event::{Event, StepRecord};
use crate::ids::WorkerId;
use crate::lease::Lease;
use crate::membership::{self, Action, Outcome};
use crate::past::Past;
use crate::protocol::{Blame, Failure, Formation, Holding, StepReport};
use crate::server::RunEnd;

/// A take-over that is under way.
#[derive(Debug)]
pub(super) struct TakeOver {
    since: Instant,
    past: Past,
}

impl TakeOver {
    pub(super) fn begin(recorded: Option<u64>) -> Self {
        Self { since: Instant::now(), past: Past::new(recorded) }
    }

    /// What a worker has told of steps does not count.
    pub(super) fn disown(&mut self, worker: WorkerId) {
        self.past.disown(worker);
    }
}

impl Core {
    /// A worker that came back tells of a ring that it was in. Once the next ring is formed, nobody needs to know.
    pub(super) fn hear_of_ring(&mut self, worker: WorkerId, ring: Formation) -> membership::Event {
        let micro_batches = self.config.membership.micro_batches;
        match self.take_over.as_mut().map(|take_over| take_over.past.ring(worker, &ring, micro_batches)) {
            Some(Ok(())) => membership::Event::Past(worker, ring),
            Some(Err(text)) => membership::Event::Failed(worker, Failure { text, blame: Blame::Worker }),
            None => membership::Event::Heard(worker),
        }
    }

    /// What it reported of a step in such a ring.
    pub(super) fn hear_of_step(&mut self, worker: WorkerId, report: StepReport) -> membership::Event {
        let micro_batches = self.config.membership.micro_batches;
        if let Some(TakeOver { past, .. }) = &mut self.take_over {
            let ring = past.known(report.generation);
            if let Some(text) = ring.and_then(|ring| misreport(ring, worker, &report, micro_batches)) {
                return membership::Event::Failed(worker, Failure { text, blame: Blame::Worker });
            }
            past.report(worker, report);
        }
        membership::Event::Heard(worker)
    }

    /// A worker that came back says what it holds.
    pub(super) fn take_back(&self, worker: WorkerId, holding: Holding) -> membership::Event {
        let may_hold = |step| match &self.take_over {
            Some(take_over) => take_over.past.may_hold(worker, step),
            // It is late. What the others have is newer, or it has what nobody misses.
            None => step <= self.step,
        };
        if holding.done.len() > self.config.membership.micro_batches as usize
            || !holding.step.is_none_or(may_hold)
        {
            let text =
                format!("it came back with a state of step {:?}, of which it has not told", holding.step);
            return membership::Event::Failed(worker, Failure { text, blame: Blame::Worker });
        }
        membership::Event::Returned(worker, holding)
    }

    /// Before the first ring, which starts from this step: the ledger goes on where the dead coordinator's ended.
    pub(super) async fn settle_past(&mut self, start: u64) -> Result<(), Ending> {
        let Some(TakeOver { since, past }) = self.take_over.take() else { return Ok(()) };
        let (ledger, records) = past
            .replay(self.config.membership.micro_batches, start)
            .map_err(|error| Ending::Over(failed(&error)))?;
        self.ledger = ledger;
        for record in records {
            self.keep(record).await;
        }
        let event = Event::TookOver {
            incarnation: self.incarnation(),
            returned: self.links.values().filter(|link| link.came_back).count(),
            step: self.step,
            waited_ms: since.elapsed().as_secs_f64() * 1e3,
        };
        self.emit(event).await;
        Ok(())
    }

    async fn keep(&mut self, record: StepRecord) {
        self.step = record.step;
        self.emit(Event::Step(record)).await;
    }

    /// The lease's number; 0 without one.
    pub(super) fn incarnation(&self) -> u64 {
        self.tenure.as_ref().map_or(0, |tenure| tenure.lease.incarnation)
    }

    /// Whether it must be known that nobody has taken over, before this is done: no ring is formed and no run ended by a
    /// coordinator that is stale, and no worker called lost by one that slept.
    pub(super) fn must_look(&mut self, actions: &[Action]) -> bool {
        let outranked = std::mem::take(&mut self.outranked);
        let weighty =
            |action: &Action| matches!(action, Action::Form(_) | Action::End(..) | Action::Restore(_));
        let overdue = self.tenure.as_ref().is_some_and(Tenure::is_overdue);
        outranked || actions.iter().any(weighty) || overdue && !actions.is_empty()
    }

    /// Who has taken over from this one, if somebody has.
    pub(super) async fn successor(&self) -> Option<Lease> {
        match &self.tenure {
            Some(tenure) => tenure.successor().await,
            None => None,
        }
    }

    /// Ends without a word to the workers: they are the other's.
    pub(super) async fn give_way(&mut self, successor: &Lease) -> RunEnd {
        let (incarnation, address) = (successor.incarnation, successor.address.to_string());
        let reason = format!(
            "another coordinator, incarnation {incarnation} at {address}, has taken over from this one, incarnation {}",
            self.incarnation()
        );
        self.emit(Event::Superseded { incarnation, address }).await;
        RunEnd { outcome: Outcome::Failed, reason }
    }
}
