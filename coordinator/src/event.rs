//! The one stream of events of a run: `events.jsonl`, the progress line and the summary all read it.

use std::collections::BTreeMap;

use serde::Serialize;

/// One event; serialises to one JSON object with the tag `event`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The coordinator accepts workers.
    Listening {
        /// Where.
        address: String,
        /// Where its status page is.
        status: String,
        /// Its process.
        pid: u32,
    },
    /// The coordinator has taken over from one that has died, and the run goes on.
    TookOver {
        /// Its lease's number.
        incarnation: u64,
        /// Workers that came back to it.
        returned: usize,
        /// The newest step that is on record.
        step: u64,
        /// Milliseconds from when it listened until it knew what all of them hold.
        waited_ms: f64,
    },
    /// Another coordinator has taken over from this one, which ends.
    Superseded {
        /// The other's lease.
        incarnation: u64,
        /// Where it listens.
        address: String,
    },
    /// All workers are there; the first ring was formed.
    RunStarted {
        /// Steps of the whole run.
        steps: u64,
        /// Steps done before.
        resumed_from: u64,
    },
    /// A worker was admitted.
    WorkerJoined {
        /// Its id.
        worker: u64,
        /// Its host.
        host: String,
        /// Its process.
        pid: u32,
    },
    /// A worker that a coordinator before this one had admitted is back.
    WorkerReturned {
        /// Its id.
        worker: u64,
        /// Its host.
        host: String,
        /// Its process.
        pid: u32,
    },
    /// Somebody was not.
    WorkerRefused {
        /// Why.
        reason: String,
    },
    /// A ring was formed.
    RingFormed {
        /// Its number.
        generation: u64,
        /// Its members.
        world_size: u32,
    },
    /// A ring does not hold any more: its members say what they hold, and another is formed.
    RingRecalled {
        /// Its number.
        generation: u64,
        /// Why.
        reason: String,
    },
    /// Training waits for workers.
    Waiting {
        /// Those who are ready.
        ready: usize,
        /// How many it takes.
        needed: usize,
    },
    /// The first step of a ring that took the place of another, and what the change cost.
    Recovered {
        /// The new ring's number.
        generation: u64,
        /// Its members.
        world_size: u32,
        /// The step.
        step: u64,
        /// Why there is a new ring.
        reason: String,
        /// Milliseconds from when the coordinator knew until it knew what all members hold.
        hold_ms: f64,
        /// Milliseconds until the new ring was linked.
        form_ms: f64,
        /// Milliseconds until everybody had the state.
        transfer_ms: f64,
        /// Milliseconds until the step was committed, with what had to be computed again.
        step_ms: f64,
    },
    /// All ranks have committed a step.
    Step(StepRecord),
    /// Shares of a ring change, for some of its workers are slower than others.
    Rebalanced {
        /// The ring's number.
        generation: u64,
        /// Steps done; from the next one on it is so.
        step: u64,
        /// Milliseconds of a micro-batch, of the rank in the middle.
        median_ms: f64,
        /// Whose shares change, and how.
        shares: Vec<ShareRecord>,
    },
    /// A checkpoint is complete.
    Checkpoint {
        /// Steps done in it.
        step: u64,
        /// Where it lies.
        url: String,
        /// Its size.
        bytes: u64,
        /// From snapshot to manifest.
        seconds: f64,
    },
    /// Something that the user should know.
    Notice {
        /// In words.
        message: String,
    },
    /// A worker is gone.
    WorkerLost {
        /// Its id.
        worker: u64,
        /// Why.
        reason: String,
    },
    /// A worker's state is not that of the majority of its ring: nothing of it is used, and it is lost.
    WorkerQuarantined {
        /// Its id.
        worker: u64,
        /// Steps done.
        step: u64,
        /// `state`, or `parameters` where it computed with others than it should have.
        what: &'static str,
        /// Hash of its own, 16 hexadecimal digits.
        hash: String,
        /// Of the others'.
        majority: String,
        /// How many ranks agree on that.
        agreed: usize,
        /// Of how many.
        ranks: usize,
    },
    /// A worker has left as it was told to.
    WorkerLeft {
        /// Its id.
        worker: u64,
        /// Why.
        reason: String,
    },
    /// The run is to have another number of workers: those that are too many leave, its launcher starts those that lack.
    ScaleRequested {
        /// How many it is to have.
        wanted: u32,
        /// How many it has.
        there: u32,
    },
    /// The launcher has asked whether this coordinator lives.
    Alive,
    /// The run is over; how it ended comes next, and then workers are told.
    RunEnding,
    /// How the run ended; who comes now is refused.
    RunEnded {
        /// `done`, `interrupted` or `failed`.
        outcome: &'static str,
        /// Why, where it failed.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
        /// Loss of a unigram model of the same tokens.
        #[serde(skip_serializing_if = "Option::is_none")]
        unigram_loss: Option<f64>,
        /// Loss on held-out samples.
        #[serde(skip_serializing_if = "Option::is_none")]
        held_out_loss: Option<f64>,
        /// Parameters of the model.
        #[serde(skip_serializing_if = "Option::is_none")]
        parameters: Option<u64>,
        /// Hash of the final state.
        #[serde(skip_serializing_if = "Option::is_none")]
        state_hash: Option<String>,
    },
}

/// A worker's share that changes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShareRecord {
    /// Whose.
    pub worker: u64,
    /// Micro-batches of a step until now.
    pub before: u32,
    /// From now on.
    pub after: u32,
    /// Milliseconds that one takes it.
    pub ms: f64,
}

/// A committed step, of all ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean over micro-batches, before the update.
    pub loss: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// 16 hexadecimal digits.
    pub state_hash: String,
    /// Tokens of the step.
    pub tokens: u64,
    /// Blocks of sums that followed in 64 bits.
    pub wide_blocks: u64,
    /// Ranks.
    pub world_size: u32,
    /// Number of the ring.
    pub generation: u64,
    /// By rank.
    pub ranks: Vec<RankRecord>,
}

/// One rank's part of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankRecord {
    /// Place in the ring.
    pub rank: u32,
    /// Who.
    pub worker: u64,
    /// What it computed.
    pub micro_batches: Vec<u32>,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes of state that it holds, by kind.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub held: BTreeMap<String, u64>,
    /// Bytes of `tx_bytes` by the operation that they were sent for; an operation that sent none is left out.
    pub sent: BTreeMap<String, u64>,
    /// Seconds by phase.
    pub seconds: BTreeMap<String, f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steps_line_is_pinned() {
        let rank = RankRecord {
            rank: 0,
            worker: 3,
            micro_batches: vec![0, 1],
            tx_bytes: 5,
            rx_bytes: 6,
            held: BTreeMap::from([("moments".into(), 7)]),
            sent: BTreeMap::from([("all-gather".into(), 5)]),
            seconds: BTreeMap::from([("compute".to_owned(), 0.5)]),
        };
        let step = StepRecord {
            step: 1,
            loss: 2.5,
            grad_norm: 1.0,
            lr: 0.1,
            state_hash: "00".into(),
            tokens: 64,
            wide_blocks: 0,
            world_size: 1,
            generation: 1,
            ranks: vec![rank],
        };
        assert_eq!(
            serde_json::to_string(&Event::Step(step)).unwrap(),
            r#"{"event":"step","step":1,"loss":2.5,"grad_norm":1.0,"lr":0.1,"state_hash":"00","tokens":64,"wide_blocks":0,"world_size":1,"generation":1,"ranks":[{"rank":0,"worker":3,"micro_batches":[0,1],"tx_bytes":5,"rx_bytes":6,"held":{"moments":7},"sent":{"all-gather":5},"seconds":{"compute":0.5}}]}"#
        );
    }
}
