//! A disturbed run held against one to which nothing happened, by their events.
//!
//! What is compared must be there: an event that lacks it is no agreement.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use mattock_worker::trainer::SHARDS_LOST;
use serde_json::Value;

use super::events::of_kind;

/// What is compared of a step.
#[derive(Debug, Clone, PartialEq)]
struct Step {
    loss_bits: u64,
    state_hash: String,
}

/// What a good run went through.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Steps done.
    pub steps: u64,
    /// Rings formed.
    pub rings: usize,
    /// Times that the state was read from storage, after the start.
    pub restores: usize,
    /// Workers whose memory failed, and that were found.
    pub corrupted: usize,
    /// Milliseconds from the end of a ring, as the coordinator noticed it, to the next one's first step.
    pub recoveries_ms: Vec<f64>,
}

/// A bit of a worker's memory that flips.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flip {
    /// Whose: one of the first workers.
    pub worker: u64,
    /// Before it begins this step.
    pub step: u64,
}

/// When a worker dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Some time after the step is done, killed from outside.
    Any,
    /// When some of its buckets have been sent to be summed, and others have not.
    Buckets,
    /// When all have been summed, and the step is not committed.
    Summed,
    /// When the step is committed, and not written.
    Committed,
    /// While it is written.
    Updating,
}

/// A worker that dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Death {
    /// Which: one of the first workers.
    pub worker: u64,
    /// In this step.
    pub step: u64,
    /// When.
    pub moment: Moment,
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { worker, step, moment } = self;
        match moment {
            Moment::Any => write!(f, "worker {worker} is killed after step {step}"),
            Moment::Buckets => write!(f, "worker {worker} dies in step {step}, between its buckets"),
            Moment::Summed => write!(f, "worker {worker} dies in step {step}, summed and not committed"),
            Moment::Committed => write!(f, "worker {worker} dies in step {step}, committed and not written"),
            Moment::Updating => write!(f, "worker {worker} dies in step {step}, while it is written"),
        }
    }
}

/// What was done to a run.
#[derive(Debug, Clone, Default)]
pub struct Harm {
    /// Workers to which something happened that they need not survive.
    pub struck: BTreeSet<u64>,
    /// Whether at some time no worker was left.
    pub all_died: bool,
    /// A bit that flipped, which must be found.
    pub flip: Option<Flip>,
    /// The only death there is to be.
    pub death: Option<Death>,
    /// Whoever was struck, others have all that it had.
    pub held: bool,
}

/// What nothing happened to.
#[derive(Debug, Clone)]
pub struct Reference {
    steps: BTreeMap<u64, Step>,
    micro_batches: Vec<u64>,
    /// On held-out samples, in bits; of the whole run.
    held_out: Option<u64>,
}

impl Reference {
    /// From the events of an undisturbed run of so many micro-batches a step.
    ///
    /// # Errors
    /// Where they are not those of a whole run.
    pub fn of(events: &[Value], micro_batches: u32) -> Result<Self, String> {
        let steps = steps(events)?;
        if steps.is_empty() {
            return Err("the undisturbed run has no steps".to_owned());
        }
        let micro_batches = (0..u64::from(micro_batches)).collect();
        let reference = Self { steps, micro_batches, held_out: held_out(events) };
        let flaw = reference.each_once(events).and_then(|()| reference.same_end(events));
        flaw.map_err(|flaw| format!("the undisturbed run: {flaw}"))?;
        Ok(reference)
    }

    /// The same of its first steps, up to `last`.
    ///
    /// # Errors
    /// Where it has not so many.
    pub fn up_to(&self, last: u64) -> Result<Self, String> {
        let steps: BTreeMap<u64, Step> =
            self.steps.range(..=last).map(|(step, it)| (*step, it.clone())).collect();
        match steps.contains_key(&last) {
            true => Ok(Self { steps, micro_batches: self.micro_batches.clone(), held_out: None }),
            false => Err(format!("the undisturbed run has no step {last}")),
        }
    }

    /// Holds a run to which this was done against it.
    ///
    /// # Errors
    /// What differs, in words.
    pub fn audit(&self, events: &[Value], harm: &Harm) -> Result<Report, String> {
        let disturbed = steps(events)?;
        self.same_steps(&disturbed)?;
        self.each_once(events)?;
        self.same_end(events)?;
        let restores = of_kind(events, "run_started").count().saturating_sub(1);
        // Where state is divided, all holders of a part may be struck at once.
        let part_lost = of_kind(events, "ring_recalled").any(|event| event.to_string().contains(SHARDS_LOST));
        if restores > 0 && (harm.held || !harm.all_died && !part_lost) {
            return Err("the state was read from storage although workers had it".to_owned());
        }
        same_processes(events, &harm.struck)?;
        found(events, harm.flip)?;
        harm.death.map_or(Ok(()), |death| died(events, death))?;
        let ms =
            |event: &Value| ["hold_ms", "form_ms", "transfer_ms", "step_ms"].map(|key| event[key].as_f64());
        let recoveries = of_kind(events, "recovered").map(|event| ms(event).into_iter().flatten().sum());
        Ok(Report {
            steps: disturbed.len() as u64,
            rings: of_kind(events, "ring_formed").count(),
            restores,
            corrupted: usize::from(harm.flip.is_some()),
            recoveries_ms: recoveries.collect(),
        })
    }

    fn same_steps(&self, disturbed: &BTreeMap<u64, Step>) -> Result<(), String> {
        for (step, expected) in &self.steps {
            let got = disturbed.get(step).ok_or_else(|| format!("step {step} is missing"))?;
            if got != expected {
                return Err(format!("step {step} is {got:?}, undisturbed it is {expected:?}"));
            }
        }
        match disturbed.keys().find(|step| !self.steps.contains_key(step)) {
            Some(step) => Err(format!("step {step} is one too many")),
            None => Ok(()),
        }
    }

    /// Every step has counted every micro-batch, once.
    fn each_once(&self, events: &[Value]) -> Result<(), String> {
        for event in of_kind(events, "step") {
            let computed = computed(event);
            if computed != self.micro_batches {
                return Err(format!(
                    "step {} counted micro-batches {computed:?}, it has 0 to {}",
                    event["step"],
                    self.micro_batches.len() - 1
                ));
            }
        }
        Ok(())
    }

    /// What the run says of its end is what its last step says, and its held-out loss is this one's, where both did all steps.
    fn same_end(&self, events: &[Value]) -> Result<(), String> {
        let ended = of_kind(events, "run_ended").next_back().ok_or("no event says how the run ended")?;
        let (hash, last) = (ended["state_hash"].as_str(), self.steps.last_key_value());
        let want = last.map(|(_, last)| last.state_hash.as_str());
        if hash != want {
            return Err(format!("the run ended with state {hash:?}, its last step has {want:?}"));
        }
        let held_out = held_out(events);
        match self.held_out.is_some() && held_out != self.held_out {
            true => {
                Err(format!("the held-out loss is {}, undisturbed it is another", ended["held_out_loss"]))
            }
            false => Ok(()),
        }
    }
}

fn held_out(events: &[Value]) -> Option<u64> {
    of_kind(events, "run_ended").next_back()?["held_out_loss"].as_f64().map(f64::to_bits)
}

/// Whoever was in a ring, and to whom nothing happened, is in the last, and a worker is one process all along.
fn same_processes(events: &[Value], struck: &BTreeSet<u64>) -> Result<(), String> {
    let last = of_kind(events, "step").next_back().map(workers).unwrap_or_default();
    let ever: BTreeSet<u64> = of_kind(events, "step").flat_map(workers).collect();
    if let Some(worker) = ever.difference(struck).find(|worker| !last.contains(worker)) {
        return Err(format!("worker {worker} is gone, though nothing happened to its process"));
    }
    let mut processes = BTreeMap::new();
    for event in of_kind(events, "worker_joined").chain(of_kind(events, "worker_returned")) {
        let (worker, process) = (event["worker"].as_u64(), event["pid"].as_u64());
        let known = *processes.entry(worker).or_insert(process);
        if process.is_none() || known != process {
            return Err(format!("worker {worker:?} is process {known:?}, and then {process:?}"));
        }
    }
    match ever.iter().find(|worker| !processes.contains_key(&Some(**worker))) {
        Some(worker) => Err(format!("worker {worker} trains, and no event says which process it is")),
        None => Ok(()),
    }
}

/// The worker whose memory failed is named, before the step of it counts, and no other.
fn found(events: &[Value], flip: Option<Flip>) -> Result<(), String> {
    let named = |event: &Value| Some((event["worker"].as_u64()?, event["step"].as_u64()?));
    let named: Vec<_> = of_kind(events, "worker_quarantined").map(named).collect();
    let want: Vec<_> = flip.iter().map(|flip| Some((flip.worker, flip.step - 1))).collect();
    match named == want {
        true => Ok(()),
        false => Err(format!("quarantined were (worker, steps done) {named:?}, memory failed of {want:?}")),
    }
}

/// This worker was lost, not before its time, and no other.
fn died(events: &[Value], death: Death) -> Result<(), String> {
    let lost: Vec<Option<u64>> =
        of_kind(events, "worker_lost").map(|event| event["worker"].as_u64()).collect();
    if lost != [Some(death.worker)] {
        return Err(format!("lost were {lost:?}, and it was to be that {death}"));
    }
    let before = events.iter().take_while(|event| event["event"] != "worker_lost");
    let step =
        before.filter(|event| event["event"] == "step").filter_map(|step| step["step"].as_u64()).last();
    let (step, own) = (step.unwrap_or(0), death.step);
    // Reports of the step before may be under way, and that of its own step only where it is committed.
    let (from, to) = match death.moment {
        Moment::Any => (own, u64::MAX),
        Moment::Buckets | Moment::Summed => (own.saturating_sub(2), own - 1),
        Moment::Committed | Moment::Updating => (own.saturating_sub(2), own),
    };
    // Where it went back to a checkpoint, the steps are gone from the record that come after that.
    let went_back = of_kind(events, "run_started").count() > 1;
    match (step >= from || went_back) && step <= to {
        true => Ok(()),
        false => Err(format!("it was to be that {death}, and step {step} was the newest")),
    }
}

/// Steps by number; each of them once.
fn steps(events: &[Value]) -> Result<BTreeMap<u64, Step>, String> {
    let mut steps = BTreeMap::new();
    for event in of_kind(events, "step") {
        let number = event["step"].as_u64().ok_or_else(|| format!("a step without a number: {event}"))?;
        let loss = event["loss"].as_f64().ok_or_else(|| format!("step {number} has no loss"))?;
        let state_hash = event["state_hash"].as_str().filter(|hash| !hash.is_empty());
        let state_hash = state_hash.ok_or_else(|| format!("step {number} has no state hash"))?.to_owned();
        let step = Step { loss_bits: loss.to_bits(), state_hash };
        if steps.insert(number, step).is_some() {
            return Err(format!("step {number} was recorded twice"));
        }
    }
    Ok(steps)
}

/// The micro-batches that a step counted, in their order.
fn computed(step: &Value) -> Vec<u64> {
    let ranks = step["ranks"].as_array().into_iter().flatten();
    let all = ranks.flat_map(|rank| rank["micro_batches"].as_array().into_iter().flatten());
    let mut all: Vec<u64> = all.filter_map(Value::as_u64).collect();
    all.sort_unstable();
    all
}

/// The workers of a step's ring.
pub(super) fn workers(step: &Value) -> BTreeSet<u64> {
    step["ranks"].as_array().into_iter().flatten().filter_map(|rank| rank["worker"].as_u64()).collect()
}

#[cfg(test)]
mod tests;
