//! How fast a run goes: sums and rates over its events. Pure; the time of each event comes in as an argument.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::event::{Event, Share, Step};

/// Rates on the live line are taken over this long.
const WINDOW: Duration = Duration::from_secs(10);
/// Bounds the window's memory where steps are very short.
const WINDOW_STEPS_MAX: usize = 4096;
/// Undisturbed steps by which it is judged what a disturbed one has lost.
const TYPICAL_STEPS: usize = 64;
/// The phase whose seconds the bytes of a rank were sent in.
const EXCHANGE: &str = "exchange";

/// What the events so far add up to.
#[derive(Debug, Clone)]
pub struct Meter {
    /// Steps of the whole run.
    pub steps: u64,
    /// The newest step.
    pub last: Option<Step>,
    /// Workers that have fewer micro-batches than others, for they are slow.
    pub slow: BTreeSet<String>,
    /// Where complete checkpoints lie, in order.
    pub checkpoints: Vec<String>,
    /// Those that were told of since the run started, or went back.
    told: BTreeSet<String>,
    /// Seconds by phase, over all ranks and steps.
    phases: BTreeMap<String, f64>,
    started: Instant,
    /// The end of the first step seen: what came before is start-up.
    first_step: Option<Instant>,
    tokens_after_first: u64,
    window: VecDeque<Sample>,
    /// The highest step that was ever done.
    highest: u64,
    last_step: Option<Instant>,
    /// Rings have changed since the last step.
    disturbed: bool,
    /// How long undisturbed steps took.
    typical: VecDeque<Duration>,
    /// What changes of rings have cost, and steps that were done again.
    lost: Duration,
}

/// One step in the window.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    tokens: u64,
    tx_bytes: u64,
    exchange_seconds: f64,
}

impl Meter {
    /// Nothing seen yet.
    pub fn new(now: Instant) -> Self {
        Self {
            steps: 0,
            last: None,
            slow: BTreeSet::new(),
            checkpoints: Vec::new(),
            told: BTreeSet::new(),
            phases: BTreeMap::new(),
            started: now,
            first_step: None,
            tokens_after_first: 0,
            window: VecDeque::new(),
            highest: 0,
            last_step: None,
            disturbed: false,
            typical: VecDeque::new(),
            lost: Duration::ZERO,
        }
    }

    /// Whether a step or checkpoint was told already, and the run has not gone back behind it since.
    pub fn knows(&self, event: &Event) -> bool {
        match event {
            Event::Step(step) => self.last.as_ref().is_some_and(|last| step.step <= last.step),
            Event::Checkpoint { url, .. } => self.told.contains(url),
            _ => false,
        }
    }

    /// Adds one event.
    pub fn absorb(&mut self, now: Instant, event: &Event) {
        match event {
            Event::RunStarted { steps, resumed_from } => {
                self.steps = *steps;
                self.disturbed = true;
                // What follows is done again.
                self.last = self.last.take().filter(|last| last.step <= *resumed_from);
                self.told.clear();
            }
            // Its shares are even at first.
            Event::RingFormed { .. } => self.slow.clear(),
            Event::Rebalanced { median_ms, shares } => {
                for Share { worker, before, after, ms } in shares {
                    if after < before && ms > median_ms {
                        self.slow.insert(worker.clone());
                    } else if ms <= median_ms {
                        self.slow.remove(worker);
                    }
                }
            }
            Event::Checkpoint { url, .. } => {
                self.checkpoints.push(url.clone());
                self.told.insert(url.clone());
            }
            Event::RingRecalled { .. } | Event::TookOver { .. } | Event::Waiting { .. } => {
                self.disturbed = true
            }
            Event::Step(step) => {
                self.account(now, step.step);
                self.step(now, step);
            }
            _ => {}
        }
    }

    /// What of the time since the last step was lost: all of it where the step was done before, and where rings have changed
    /// what is beyond an undisturbed one.
    fn account(&mut self, now: Instant, step: u64) {
        let again = step <= self.highest;
        self.highest = self.highest.max(step);
        let disturbed = std::mem::take(&mut self.disturbed);
        let Some(before) = self.last_step.replace(now) else { return };
        let took = now.duration_since(before);
        if again {
            self.lost += took;
        } else if disturbed {
            let mut typical = Vec::from_iter(self.typical.iter().copied());
            typical.sort_unstable();
            self.lost += took.saturating_sub(typical.get(typical.len() / 2).copied().unwrap_or_default());
        } else {
            self.typical.push_back(took);
            if self.typical.len() > TYPICAL_STEPS {
                self.typical.pop_front();
            }
        }
    }

    /// The part of the time since the first step that went into steps, and not into changes of rings or steps done again; none
    /// before the second step.
    pub fn goodput(&self) -> Option<f64> {
        let whole = self.last_step?.duration_since(self.first_step?).as_secs_f64();
        (whole > 0.0).then(|| 1.0 - self.lost.as_secs_f64() / whole)
    }

    fn step(&mut self, now: Instant, step: &Step) {
        for (phase, seconds) in step.ranks.iter().flat_map(|rank| &rank.seconds) {
            *self.phases.entry(phase.clone()).or_default() += seconds;
        }
        match self.first_step {
            None => self.first_step = Some(now),
            Some(_) => self.tokens_after_first += step.tokens,
        }
        let exchange = step.ranks.iter().filter_map(|rank| rank.seconds.get(EXCHANGE));
        self.window.push_back(Sample {
            at: now,
            tokens: step.tokens,
            tx_bytes: step.ranks.iter().map(|rank| rank.tx_bytes).sum(),
            exchange_seconds: exchange.sum(),
        });
        let stale = |sample: &Sample| now.duration_since(sample.at) > WINDOW;
        while self.window.len() > WINDOW_STEPS_MAX
            || (self.window.len() > 2 && self.window.front().is_some_and(stale))
        {
            self.window.pop_front();
        }
        self.last = Some(step.clone());
    }

    /// Tokens per second over the window; none before the second step.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let tokens: u64 = self.window.iter().skip(1).map(|sample| sample.tokens).sum();
        per_second(tokens, self.window_span()?)
    }

    /// Tokens per second of the whole run, without its first step where there are more.
    pub fn mean_tokens_per_second(&self, now: Instant) -> Option<f64> {
        let last = self.window.back()?;
        match self.first_step {
            Some(first) if self.tokens_after_first > 0 => {
                per_second(self.tokens_after_first, last.at.duration_since(first))
            }
            _ => per_second(last.tokens, now.duration_since(self.started)),
        }
    }

    /// Bytes per second that a rank sends while it exchanges; none where nothing is sent.
    pub fn ring_bytes_per_second(&self) -> Option<f64> {
        let bytes: u64 = self.window.iter().map(|sample| sample.tx_bytes).sum();
        let seconds: f64 = self.window.iter().map(|sample| sample.exchange_seconds).sum();
        (bytes > 0 && seconds > 0.0).then(|| bytes as f64 / seconds)
    }

    /// Until the last step, at the pace of the window.
    pub fn time_left(&self) -> Option<Duration> {
        let left = self.steps.saturating_sub(self.last.as_ref()?.step);
        let per_step = self.window_span()?.div_f64(self.window.len().saturating_sub(1).max(1) as f64);
        Duration::try_from_secs_f64(per_step.as_secs_f64() * left as f64).ok()
    }

    /// Each phase's share of the ranks' time, the greatest first; the shares add up to 1.
    pub fn shares(&self) -> Vec<(String, f64)> {
        let whole: f64 = self.phases.values().sum();
        let mut shares: Vec<_> = self
            .phases
            .iter()
            .filter(|_| whole > 0.0)
            .map(|(phase, seconds)| (phase.clone(), seconds / whole))
            .collect();
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        shares
    }

    fn window_span(&self) -> Option<Duration> {
        let span = self.window.back()?.at.duration_since(self.window.front()?.at);
        (!span.is_zero()).then_some(span)
    }
}

fn per_second(count: u64, time: Duration) -> Option<f64> {
    (!time.is_zero()).then(|| count as f64 / time.as_secs_f64())
}
