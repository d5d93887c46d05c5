//! The stream of events that a coordinator prints, one JSON object a line, as far as progress needs it.
//!
//! Read leniently: fields and events that this program does not know are skipped, so that a newer
//! coordinator can be watched.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// One line of the stream.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The coordinator listens.
    RunStarted {
        /// Steps of the whole run.
        steps: u64,
        /// Steps done before, by the run that this one resumes.
        #[serde(default)]
        resumed_from: u64,
    },
    /// A coordinator has taken over from one that has died.
    TookOver {
        /// Its lease's number.
        incarnation: u64,
        /// Workers that came back.
        returned: u32,
        /// The newest step that is on record.
        step: u64,
    },
    /// Another coordinator has the run.
    Superseded {
        /// Its lease's number.
        incarnation: u64,
        /// Where it is.
        address: String,
    },
    /// A worker was admitted.
    WorkerJoined {
        /// Its id.
        #[serde(deserialize_with = "as_text")]
        worker: String,
    },
    /// A ring was formed.
    RingFormed {
        /// Number of the ring.
        generation: u64,
        /// Workers in it.
        world_size: u32,
    },
    /// A ring does not hold any more; another is formed.
    RingRecalled {
        /// Number of the ring.
        generation: u64,
        /// In words.
        reason: String,
    },
    /// Training waits for workers.
    Waiting {
        /// Those who are ready.
        ready: u32,
        /// How many it takes.
        needed: u32,
    },
    /// A ring that took the place of another has done its first step.
    Recovered(Recovered),
    /// A step was committed by every rank.
    Step(Step),
    /// Shares of a ring change, for some of its workers are slower than others.
    Rebalanced {
        /// Milliseconds of a micro-batch, of the rank in the middle.
        median_ms: f64,
        /// Whose shares change, and how.
        shares: Vec<Share>,
    },
    /// A checkpoint is complete.
    Checkpoint {
        /// Steps done in it.
        step: u64,
        /// Where it lies.
        url: String,
    },
    /// The run is to have another number of workers.
    ScaleRequested {
        /// How many it is to have.
        wanted: u32,
        /// How many it has.
        there: u32,
    },
    /// Something that the user should know.
    Notice {
        /// In words.
        message: String,
    },
    /// A worker is gone.
    WorkerLost {
        /// Its id.
        #[serde(deserialize_with = "as_text")]
        worker: String,
        /// In words.
        #[serde(default)]
        reason: String,
    },
    /// A worker's state is not that of most ranks; it is lost next.
    WorkerQuarantined {
        /// Its id.
        #[serde(deserialize_with = "as_text")]
        worker: String,
        /// Steps done.
        step: u64,
        /// What differs.
        what: String,
        /// How many ranks have the same.
        agreed: u32,
        /// Of how many.
        ranks: u32,
    },
    /// A worker has left as it was told to.
    WorkerLeft {
        /// Its id.
        #[serde(deserialize_with = "as_text")]
        worker: String,
        /// In words.
        #[serde(default)]
        reason: String,
    },
    /// Nothing follows.
    RunEnded(RunEnded),
    /// An event of a newer coordinator.
    #[serde(other)]
    Unknown,
}

/// A worker's share that changes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Share {
    /// Whose.
    #[serde(deserialize_with = "as_text")]
    pub worker: String,
    /// Micro-batches of a step until now.
    pub before: u32,
    /// From now on.
    pub after: u32,
    /// Milliseconds that one takes it.
    pub ms: f64,
}

/// A committed step.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Step {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean loss over the batch, in nats per token.
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
    /// Hash of the state after the step, as hexadecimal digits.
    pub state_hash: String,
    /// Tokens (or samples) of the batch.
    pub tokens: u64,
    /// Workers in the ring.
    pub world_size: u32,
    /// What each rank did.
    #[serde(default)]
    pub ranks: Vec<Rank>,
}

/// What a change of rings cost.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Recovered {
    /// Number of the new ring.
    pub generation: u64,
    /// Workers in it.
    pub world_size: u32,
    /// Its first step.
    pub step: u64,
    /// Why there is a new ring.
    pub reason: String,
    /// Milliseconds until it was known what everybody holds.
    pub hold_ms: f64,
    /// Milliseconds until the new ring was linked.
    pub form_ms: f64,
    /// Milliseconds until everybody had the state.
    pub transfer_ms: f64,
    /// Milliseconds until the step was committed.
    pub step_ms: f64,
}

/// What one rank did in a step.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Rank {
    /// Bytes sent to neighbours.
    #[serde(default)]
    pub tx_bytes: u64,
    /// Seconds by phase.
    #[serde(default)]
    pub seconds: BTreeMap<String, f64>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct RunEnded {
    /// How, in one word.
    #[serde(default)]
    pub outcome: RunOutcome,
    /// Why, where it failed.
    #[serde(default)]
    pub error: Option<String>,
    /// Loss of a unigram model of the same tokens.
    #[serde(default)]
    pub unigram_loss: Option<f64>,
    /// Loss on tokens that were never trained on.
    #[serde(default)]
    pub held_out_loss: Option<f64>,
    /// Parameters of the model.
    #[serde(default)]
    pub parameters: Option<u64>,
}

/// How a run ended, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunOutcome {
    /// All steps are done.
    #[default]
    Done,
    /// It was asked to stop, and wrote a checkpoint.
    Interrupted,
    /// It could not go on.
    Failed,
}

/// Ids may be numbers or text.
fn as_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::String(text) => text,
        other => other.to_string(),
    })
}

/// JSON has no NaN: it arrives as null.
fn number_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
