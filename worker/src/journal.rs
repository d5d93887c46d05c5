//! What a worker has told its coordinator, as far as another one would have to be told it again.
//!
//! A coordinator that dies takes with it what it had heard and not yet put on record. So a worker keeps the rings that it
//! was in and what it reported of their steps, the newest ones, and tells the next coordinator all of it: what is on record
//! already does no harm.
//!
//! # Invariants
//! 1. Rings come in order, each before its reports.
//! 2. All of it is bounded: the oldest goes first.

use std::collections::VecDeque;

use mattock_coordinator::protocol::{Formation, FromWorker, StepReport};
use mattock_coordinator::{REPORTS_MAX, RINGS_MAX};

/// Checkpoints and notices that are kept.
const NEWS_MAX: usize = 16;

/// What was told.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    rings: VecDeque<(Formation, Vec<StepReport>)>,
    reports: usize,
    /// Checkpoints, and what the user should know.
    news: VecDeque<FromWorker>,
    /// Ready to be put into a ring since the last one, with the state of this step, if it has one.
    ready: Option<Option<u64>>,
    leaving: Option<String>,
}

impl Journal {
    /// The coordinator has put the worker into a ring.
    pub(crate) fn enter(&mut self, ring: &Formation) {
        self.ready = None;
        // Of a ring in which no step was done nobody needs to know once there is another.
        if self.rings.back().is_some_and(|(_, reports)| reports.is_empty()) {
            self.rings.pop_back();
        }
        self.rings.push_back((ring.clone(), Vec::new()));
        while self.rings.len() > RINGS_MAX {
            self.forget_oldest_ring();
        }
    }

    /// Keeps of a message what the next coordinator would have to be told again.
    pub(crate) fn keep(&mut self, message: &FromWorker) {
        match message {
            FromWorker::Step(report) => self.report(report),
            FromWorker::Ready { step } => self.ready = Some(*step),
            FromWorker::Leaving { reason } => self.leaving = Some(reason.clone()),
            FromWorker::Checkpoint { .. } => {
                self.news.push_back(message.clone());
                if self.news.len() > NEWS_MAX {
                    self.news.pop_front();
                }
            }
            _ => {}
        }
    }

    /// What is to be told to a coordinator that took over, before what is held.
    pub(crate) fn retell(&self) -> Vec<FromWorker> {
        let ring = |(ring, reports): &(Formation, Vec<StepReport>)| {
            let reports = reports.iter().cloned().map(FromWorker::Step);
            [FromWorker::Past(ring.clone())].into_iter().chain(reports).collect::<Vec<FromWorker>>()
        };
        self.rings.iter().flat_map(ring).chain(self.news.iter().cloned()).collect()
    }

    /// What it is besides being in a ring: ready, or about to leave.
    pub(crate) fn standing(&self) -> Vec<FromWorker> {
        let ready = self.ready.map(|step| FromWorker::Ready { step });
        let leaving = self.leaving.clone().map(|reason| FromWorker::Leaving { reason });
        ready.into_iter().chain(leaving).collect()
    }

    /// Whether it waits to be put into a ring, having said so, since it was in one, if ever.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.is_some()
    }

    fn report(&mut self, report: &StepReport) {
        let newest = self.rings.back_mut().filter(|(ring, _)| ring.generation == report.generation);
        let Some((_, reports)) = newest else { return };
        reports.push(report.clone());
        self.reports += 1;
        while self.reports > REPORTS_MAX {
            self.forget_oldest_report();
        }
    }

    fn forget_oldest_report(&mut self) {
        let Some((_, reports)) = self.rings.front_mut() else { return };
        if reports.is_empty() {
            self.forget_oldest_ring();
        } else {
            // Half of what may be kept at once: to shift them one by one would cost more than it saves.
            let gone = reports.len().min(REPORTS_MAX / 2);
            reports.drain(..gone);
            self.reports -= gone;
        }
    }

    fn forget_oldest_ring(&mut self) {
        if let Some((_, reports)) = self.rings.pop_front() {
            self.reports -= reports.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(generation: u64) -> Formation {
        Formation { generation, step: 0, source: None, places: Vec::new() }
    }

    fn report(generation: u64, step: u64) -> FromWorker {
        FromWorker::Step(StepReport {
            generation,
            step,
            rank: 0,
            loss: 0.0,
            grad_norm: 0.0,
            lr: 0.0,
            hash_before: 0,
            state_hash: Some(0),
            tokens: 0,
            wide_blocks: 0,
            micro_batches: Vec::new(),
            counts: Vec::new(),
            tx_bytes: 0,
            rx_bytes: 0,
            held: Vec::new(),
            sent: Vec::new(),
            seconds: Vec::new(),
        })
    }

    /// (generation, steps) of what is told.
    fn told(journal: &Journal) -> Vec<(u64, Vec<u64>)> {
        let mut told: Vec<(u64, Vec<u64>)> = Vec::new();
        for message in journal.retell() {
            match message {
                FromWorker::Past(ring) => told.push((ring.generation, Vec::new())),
                FromWorker::Step(report) => told.last_mut().unwrap().1.push(report.step),
                _ => {}
            }
        }
        told
    }

    #[test]
    fn rings_come_before_their_reports_and_those_without_are_forgotten() {
        let mut journal = Journal::default();
        journal.keep(&report(1, 1));
        journal.enter(&ring(1));
        journal.keep(&report(1, 1));
        journal.enter(&ring(2));
        journal.enter(&ring(3));
        journal.keep(&report(3, 2));
        journal.keep(&report(2, 2));
        journal.enter(&ring(4));
        assert_eq!(told(&journal), [(1, vec![1]), (3, vec![2]), (4, vec![])]);
    }

    #[test]
    fn the_newest_reports_are_kept() {
        let mut journal = Journal::default();
        let all = 3 * REPORTS_MAX as u64;
        for step in 1..=all {
            if step % 1000 == 1 {
                journal.enter(&ring(step));
            }
            journal.keep(&report(step - (step - 1) % 1000, step));
        }
        let kept: Vec<u64> = told(&journal).into_iter().flat_map(|(_, steps)| steps).collect();
        assert!((REPORTS_MAX / 2..=REPORTS_MAX).contains(&kept.len()), "{}", kept.len());
        assert!(kept.iter().copied().eq(all + 1 - kept.len() as u64..=all), "the newest, in order");
        assert_eq!(kept.len(), journal.reports);
    }

    #[test]
    fn who_was_ready_or_about_to_leave_says_so_again() {
        let mut journal = Journal::default();
        journal.keep(&FromWorker::Ready { step: Some(3) });
        journal.keep(&FromWorker::Leaving { reason: "told to".into() });
        assert_eq!(journal.standing().len(), 2);
        journal.enter(&ring(1));
        assert_eq!(journal.standing(), [FromWorker::Leaving { reason: "told to".into() }]);
    }
}
