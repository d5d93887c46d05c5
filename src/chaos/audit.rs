//! A disturbed run held against one to which nothing happened, by their events.

use std::collections::{BTreeMap, BTreeSet};

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
    /// Milliseconds from the end of a ring, as the coordinator noticed it, to the next one's first step.
    pub recoveries_ms: Vec<f64>,
}

/// What nothing happened to.
#[derive(Debug, Clone)]
pub struct Reference {
    steps: BTreeMap<u64, Step>,
    micro_batches: Vec<u64>,
}

impl Reference {
    /// From the events of an undisturbed run.
    ///
    /// # Errors
    /// Where they are not those of a whole run.
    pub fn of(events: &[Value]) -> Result<Self, String> {
        let steps = steps(events)?;
        let first = of_kind(events, "step").next().ok_or("the undisturbed run has no steps")?;
        Ok(Self { steps, micro_batches: computed(first) })
    }

    /// The same of its first steps, up to `last`.
    ///
    /// # Errors
    /// Where it has not so many.
    pub fn up_to(&self, last: u64) -> Result<Self, String> {
        let steps: BTreeMap<u64, Step> =
            self.steps.range(..=last).map(|(step, it)| (*step, it.clone())).collect();
        match steps.contains_key(&last) {
            true => Ok(Self { steps, micro_batches: self.micro_batches.clone() }),
            false => Err(format!("the undisturbed run has no step {last}")),
        }
    }

    /// Holds a disturbed run against it; `struck` are the processes to which something happened, `all_died` tells whether
    /// at some time none was left.
    ///
    /// # Errors
    /// What differs, in words.
    pub fn audit(&self, events: &[Value], struck: &BTreeSet<u64>, all_died: bool) -> Result<Report, String> {
        let disturbed = steps(events)?;
        for (step, expected) in &self.steps {
            let got = disturbed.get(step).ok_or_else(|| format!("step {step} is missing"))?;
            if got != expected {
                return Err(format!("step {step} is {got:?}, undisturbed it is {expected:?}"));
            }
        }
        if let Some(step) = disturbed.keys().find(|step| !self.steps.contains_key(step)) {
            return Err(format!("step {step} is one too many"));
        }
        for event in of_kind(events, "step") {
            let computed = computed(event);
            if computed != self.micro_batches {
                return Err(format!("step {} counted micro-batches {computed:?}", event["step"]));
            }
        }
        let restores = of_kind(events, "run_started").count().saturating_sub(1);
        // Where state is divided, all holders of a part may be struck at once.
        let part_lost = of_kind(events, "ring_recalled").any(|event| event.to_string().contains(SHARDS_LOST));
        if restores > 0 && !all_died && !part_lost {
            return Err("the state was read from storage although workers had it".to_owned());
        }
        self.same_processes(events, struck, all_died)?;
        let ms =
            |event: &Value| ["hold_ms", "form_ms", "transfer_ms", "step_ms"].map(|key| event[key].as_f64());
        let recoveries = of_kind(events, "recovered").map(|event| ms(event).into_iter().flatten().sum());
        Ok(Report {
            steps: disturbed.len() as u64,
            rings: of_kind(events, "ring_formed").count(),
            restores,
            recoveries_ms: recoveries.collect(),
        })
    }

    /// Who was in the first ring, and to whom nothing happened, is in the last.
    fn same_processes(&self, events: &[Value], struck: &BTreeSet<u64>, all_died: bool) -> Result<(), String> {
        let members = |step: Option<&Value>| -> BTreeSet<u64> { step.map(workers).unwrap_or_default() };
        let (first, last) = (of_kind(events, "step").next(), of_kind(events, "step").next_back());
        let (first, last) = (members(first), members(last));
        match first.difference(struck).find(|worker| !last.contains(worker)) {
            Some(worker) if !all_died => {
                Err(format!("worker {worker} is gone, though nothing happened to its process"))
            }
            _ => Ok(()),
        }
    }
}

/// Steps by number; each of them once, or the same again after a restart from a checkpoint.
fn steps(events: &[Value]) -> Result<BTreeMap<u64, Step>, String> {
    let mut steps = BTreeMap::new();
    for event in of_kind(events, "step") {
        let number = event["step"].as_u64().ok_or_else(|| format!("a step without a number: {event}"))?;
        let loss = event["loss"].as_f64().unwrap_or(f64::NAN);
        let state_hash = event["state_hash"].as_str().unwrap_or_default().to_owned();
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
mod tests {
    use serde_json::json;

    use super::*;

    fn step(number: u64, hash: &str, shares: &[(u64, &[u64])]) -> Value {
        let ranks: Vec<Value> = shares
            .iter()
            .map(|(worker, share)| json!({ "worker": worker, "micro_batches": share }))
            .collect();
        json!({ "event": "step", "step": number, "loss": 1.5, "state_hash": hash, "ranks": ranks })
    }

    fn reference() -> Reference {
        Reference::of(&[step(1, "a", &[(0, &[0, 1, 2])]), step(2, "b", &[(0, &[0, 1, 2])])]).unwrap()
    }

    fn audit(events: &[Value], struck: &[u64], all_died: bool) -> Result<Report, String> {
        reference().audit(events, &struck.iter().copied().collect(), all_died)
    }

    #[test]
    fn a_run_that_shows_no_trace_is_good() {
        let recovered = json!({ "event": "recovered", "hold_ms": 1.0, "form_ms": 2.0, "transfer_ms": 0.0, "step_ms": 4.5 });
        let events = [step(1, "a", &[(0, &[0, 2]), (1, &[1])]), recovered, step(2, "b", &[(0, &[0, 1, 2])])];
        let report = audit(&events, &[1], false).unwrap();
        assert_eq!((report.steps, report.recoveries_ms), (2, vec![7.5]));
    }

    #[test]
    fn every_trace_is_seen() {
        let good = step(1, "a", &[(0, &[0, 1, 2])]);
        let started = json!({ "event": "run_started" });
        for (events, what) in [
            (vec![good.clone()], "step 2 is missing"),
            (vec![good.clone(), step(2, "c", &[(0, &[0, 1, 2])])], "step 2 is"),
            (vec![good.clone(), step(2, "b", &[(0, &[0, 1]), (1, &[1, 2])])], "counted micro-batches"),
            (vec![good.clone(), step(2, "b", &[(0, &[0, 1])])], "counted micro-batches"),
            (vec![good.clone(), good.clone()], "recorded twice"),
            (vec![good.clone(), step(2, "b", &[(1, &[0, 1, 2])])], "worker 0 is gone"),
            (vec![good.clone(), step(2, "b", &[(0, &[0, 1, 2])]), step(3, "d", &[])], "one too many"),
            (vec![started.clone(), good.clone(), started, step(2, "b", &[(0, &[0, 1, 2])])], "from storage"),
        ] {
            let error = audit(&events, &[], false).unwrap_err();
            assert!(error.contains(what), "{error}, wanted {what}");
        }
    }
}
